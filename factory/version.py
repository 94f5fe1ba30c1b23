"""Which code made a row: the installed version and, in a checkout, its commit."""

import functools
import os
import subprocess
from importlib import metadata
from pathlib import Path


@functools.cache
def code_version() -> str:
    """ "0.1.0+g1a2b3c4" in a git checkout ("-dirty" if tracked files changed), else "0.1.0".

    A submitted job has no checkout: `factory submit` names the version that it sent in FACTORY_CODE_VERSION.
    """
    if sent := os.environ.get("FACTORY_CODE_VERSION"):
        return sent
    version = metadata.version("synthetic-data-factory")
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return version
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{version}+g{done.stdout.strip()}" if done.returncode == 0 else version
