"""The folder of an export: written beside its place and renamed into it whole, or not there at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

MANIFEST = "manifest.json"
_MARK = '{"export_format": '
"""How every manifest begins: only a folder with one is ever replaced."""


def check_destination(out: str, *, overwrite: bool) -> Path:
    """The folder to write, resolved, if an export may go there.

    Raises:
        FileExistsError: it holds something and `overwrite` is not given, or holds anything but an export.
        FileNotFoundError: the folder above it is not there.
        ValueError: an address of an object store.
    """
    if "://" in out:
        raise ValueError(f"--out {out}: exports are written to a local or mounted folder")
    path = Path(out).resolve()
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder to write {path.name} into")
    if not path.exists():
        return path
    if not path.is_dir():
        raise FileExistsError(f"{path} is a file; choose another folder")
    if not any(path.iterdir()):
        return path
    if not overwrite:
        raise FileExistsError(f"{path} is not empty; choose another folder or add --overwrite")
    if not _is_export(path):
        raise FileExistsError(
            f"{path} holds files but no {MANIFEST} of an export, so --overwrite does not remove it; "
            "choose another folder"
        )
    return path


def _is_export(path: Path) -> bool:
    manifest = path / MANIFEST
    if not manifest.is_file():
        return False
    with manifest.open(encoding="utf-8", errors="replace") as stream:
        return stream.read(len(_MARK)) == _MARK


@contextlib.contextmanager
def staged_folder(out: str, *, overwrite: bool) -> Iterator[Path]:
    """Yields an empty folder beside `out`; it takes the place of `out` when the block ends without error.

    After an error or Ctrl-C the folder is removed and `out` is as it was. A killed process leaves
    `.NAME.….partial` beside `out`, which may be deleted.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: as `check_destination`, before anything is written.
    """
    path = check_destination(out, overwrite=overwrite)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        staging.chmod(0o777 & ~_umask())
        yield staging
        _put_in_place(staging, check_destination(out, overwrite=overwrite))
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _put_in_place(staging: Path, path: Path) -> None:
    if not path.exists() or not any(path.iterdir()):
        staging.replace(path)  # rename takes the place of an empty folder
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    path.replace(old)
    try:
        staging.replace(path)
    except OSError:
        old.replace(path)
        raise
    shutil.rmtree(old)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
