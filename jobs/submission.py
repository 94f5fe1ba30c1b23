"""What a submission consists of: a checked command, the packed working tree, the environment it needs."""

import contextlib
import dataclasses
import hashlib
import importlib
import logging
import os
import re
import shlex
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factory.redaction import is_secret_name, redact

ROOT = Path(__file__).resolve().parents[1]
MAX_PACKAGE_MB = 100
EXCLUDES = (
    ".git", ".venv", "venv", "__pycache__", "*.egg-info", "*.lance", "*.lance.*", "runs", "mlruns", "mlflow.db*",
    ".env", ".env.*", "*.pem", "*.key", "id_rsa*", "id_ed25519*", ".ssh", ".aws", "auth_token",
)  # fmt: skip
"""Left out of the package beside what .gitignore names: tables, runs, environments, keys."""
ALWAYS_SENT = ("MLFLOW_TRACKING_URI", "HF_HUB_OFFLINE")
"""Variables of this shell that a job gets where they are set."""


@dataclass(frozen=True, kw_only=True)
class Submittable:
    """A verb that a cluster can run.

    Attributes:
        paths: fields of its `Args` that are always files, folders or tables; of 0=TABLE, the table.
        positionals: fields of its `Args` that come without an option name, in order.
        folders: those of `paths` that are plain files or folders of them, which a URI cannot name.
        module: where its `Args` are, if not in jobs.VERB.
    """

    paths: tuple[str, ...]
    positionals: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    module: str = ""


SUBMITTABLE: dict[str, Submittable] = {
    "prepare": Submittable(paths=("path", "out", "embedder_weights"), positionals=("layout", "path")),
    "caption": Submittable(paths=("real", "out", "captions")),
    "train": Submittable(paths=("real", "out", "adapt_from"), folders=("out", "adapt_from")),
    "heal": Submittable(paths=("generator", "real", "out")),
    "synthesize": Submittable(paths=("generator", "real", "out", "adapters")),
    "curate": Submittable(paths=("table", "real"), positionals=("table",)),
    "explore ratio": Submittable(
        paths=("real", "synthetic", "fold_table", "weights", "out"),
        folders=("weights", "out"),
        module="tune.explore_ratio",
    ),
    "explore sampler": Submittable(
        paths=("real", "synthetic", "weights", "out"),
        folders=("weights", "out"),
        module="tune.explore_sampler",
    ),
}
"""By verb, or by verb and the word that follows it where the verb has several forms."""
SUBMITTABLE_VERBS = tuple(dict.fromkeys(name.split()[0] for name in SUBMITTABLE))
"""The first words of `SUBMITTABLE`."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A verb with its arguments, parsed and checked.

    Attributes:
        verb: a key of `SUBMITTABLE`.
    """

    verb: str
    args: Any
    overrides: tuple[str, ...]

    def argv(self) -> list[str]:
        """The arguments as words, every one that is not the default."""
        words: list[str] = []
        described = SUBMITTABLE[self.verb]
        options = [f for f in dataclasses.fields(self.args) if f.name != "overrides"]
        for field in options:
            value = getattr(self.args, field.name)
            if field.name in described.positionals or value is None or value == field.default:
                continue
            option = f"--{field.name.replace('_', '-')}"
            if isinstance(value, bool) and "None" not in str(field.type):
                words.append(option if value else f"--no-{option.removeprefix('--')}")
            elif isinstance(value, (tuple, list)):
                words += [option, *map(str, value)]
            else:
                words += [option, str(value)]
        named = [str(getattr(self.args, name)) for name in described.positionals]
        return [*(word for word in named if word), *words, *self.overrides]

    def entrypoint(self) -> str:
        """What the head's shell executes in the unpacked tree; every word is quoted."""
        return shlex.join(["python", "-m", "jobs.cli", *self.verb.split(), *self.argv()])

    def line(self) -> str:
        """The command as a user types it, without secrets."""
        return redact(shlex.join(["factory", *self.verb.split(), *self.argv()]))


def parse_command(verb: str, argv: Sequence[str], tree: Path) -> Command:
    """The verb's own parser and its recipe's, run here, so that a typing error costs no cluster time.

    Raises:
        ValueError: a verb that only makes sense on this machine, unknown recipe or option, an `--address`.
        SystemExit: a value of the wrong type (the parser has said so).
    """
    if verb in SUBMITTABLE_VERBS and verb not in SUBMITTABLE:
        verb, argv = " ".join([verb, *argv[:1]]), argv[1:]
    if verb not in SUBMITTABLE:
        raise ValueError(f"{verb!r} cannot be submitted; the cluster runs {', '.join(SUBMITTABLE)}")
    module = importlib.import_module(SUBMITTABLE[verb].module or f"jobs.{verb}")
    if hasattr(module, "parse"):
        args = module.parse(argv)
    elif "overrides" in {field.name for field in dataclasses.fields(module.Args)}:
        from jobs.recipe_args import parse_args

        args = parse_args(module.Args, argv, f"factory {verb}", module.__doc__ or "")
    else:
        import tyro

        args = tyro.cli(module.Args, args=list(argv), prog=f"factory {verb}", description=module.__doc__)
    for name in ("address", "num_cpus"):
        if getattr(args, name, None) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} of {verb}: a submitted job joins the cluster it is submitted to; leave it "
                "out, or name the cluster before the verb: factory submit --address URL …"
            )
    for name in SUBMITTABLE[verb].folders:
        if "://" in str(getattr(args, name)):
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: plain files, which no bucket holds; name a path that "
                "every node mounts, such as /shared/…"
            )
    overrides = tuple(getattr(args, "overrides", ()))
    if hasattr(args, "recipe"):
        from jobs.recipe_args import parse_recipe

        # A recipe module:function must be found in the tree that is sent.
        with contextlib.chdir(tree):
            parse_recipe(args.recipe, overrides)
    return Command(verb=verb, args=args, overrides=overrides)


def path_key(value: str) -> str:
    """What stands before a path that is given by number: "0=" of 0=fold0.lance, else nothing."""
    found = re.match(r"\d+=", value)
    return found.group() if found else ""


def with_paths(command: Command, *, tree: Path, sent: Sequence[str], shared: bool) -> Command:
    """The command with paths that hold where it runs.

    Args:
        sent: files of the package, relative to `tree`.
        shared: the cluster sees the files of this machine under the same paths.

    Raises:
        ValueError: a path that the cluster will not see, naming its option.
    """

    def place(option: str, value: str, always: bool) -> str:
        if always and (key := path_key(value)):
            return key + place(option, value.removeprefix(key), True)
        path = Path(value).expanduser()
        if not value or "://" in value or (not always and not path.exists()):
            return value
        if shared:
            return str(path.absolute())
        here = path.absolute()
        inside = here.relative_to(tree) if here.is_relative_to(tree) else None
        if inside is not None and any(Path(name).is_relative_to(inside) for name in sent) and inside.parts:
            return str(inside)
        raise ValueError(
            f"{option} {value}: a path of this machine, which the cluster at --address does not see. Put it on storage "
            "and name it by URI (s3://…), or give --allow-local-paths where every node mounts it under this path"
        )

    changes: dict[str, Any] = {}
    described = SUBMITTABLE[command.verb]
    for field in dataclasses.fields(command.args):
        value = getattr(command.args, field.name)
        option = field.name if field.name in described.positionals else f"--{field.name.replace('_', '-')}"
        always = field.name in described.paths
        if always and isinstance(value, (tuple, list)):
            changes[field.name] = tuple(place(option, str(item), True) for item in value)
        elif always and isinstance(value, str) and value:
            changes[field.name] = place(option, value, True)
    overrides = tuple(_place_override(command.overrides, place))
    return dataclasses.replace(
        command, args=dataclasses.replace(command.args, **changes), overrides=overrides
    )


def _place_override(words: Sequence[str], place: Any) -> list[str]:
    """Overrides name a file where their value is one here; names of models and numbers stay."""
    placed, option = [], ""
    for word in words:
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            placed.append(f"{option}={place(option, value, False)}" if equals and value != "tiny" else word)
        else:
            placed.append(word if word == "tiny" or ":" in word.split("/")[0] else place(option, word, False))
    return placed


# ------------------------------------------------------------------------------------------ the package


@dataclass(frozen=True, kw_only=True)
class Package:
    """The packed working tree."""

    path: Path
    files: tuple[str, ...]
    megabytes: float
    digest: str


def pack(tree: Path, folder: Path) -> Package:
    """Zip the tree, without what .gitignore and `EXCLUDES` name, into `folder`.

    Raises:
        ValueError: `tree` does not hold this program, or the package is larger than `MAX_PACKAGE_MB`.
    """
    from ray._private.runtime_env.packaging import create_package

    if not (tree / "jobs" / "cli.py").is_file():
        raise ValueError(
            f"--working-dir {tree}: does not hold jobs/cli.py; give the folder of a checkout, which is sent to the cluster"
        )
    target = folder / "tree.zip"
    quiet = logging.getLogger("factory.submit.package")
    quiet.setLevel(logging.ERROR)
    create_package(str(tree), target, include_gitignore=True, excludes=list(EXCLUDES), logger=quiet)
    with zipfile.ZipFile(target) as package:
        infos = sorted(package.infolist(), key=lambda info: -info.file_size)
        # Content, not the archive: the archive holds the times of files too.
        digest = hashlib.sha256(
            "".join(
                f"{i.filename}:{i.CRC}:{i.file_size};" for i in sorted(infos, key=lambda i: i.filename)
            ).encode()
        ).hexdigest()[:16]
    megabytes = target.stat().st_size / 1e6
    if megabytes > MAX_PACKAGE_MB:
        largest = ", ".join(f"{info.filename} ({info.file_size / 1e6:.0f} MB)" for info in infos[:3])
        raise ValueError(
            f"the working tree packs to {megabytes:.0f} MB, more than {MAX_PACKAGE_MB}: {largest}, …; name data in "
            ".gitignore or .rayignore, or move it to storage"
        )
    return Package(
        path=target, files=tuple(info.filename for info in infos), megabytes=megabytes, digest=digest
    )


# ------------------------------------------------------------------------------------------ the environment


def environment(names: Sequence[str], *, shared: bool) -> dict[str, str]:
    """Variables that the job gets: those always sent, and those asked for by name.

    Raises:
        ValueError: a name asked for that is not set here.
    """
    from factory.version import code_version

    found = {name: os.environ[name] for name in ALWAYS_SENT if os.environ.get(name)}
    for name in names:
        if "=" in name:
            raise ValueError(
                f"--env {name.partition('=')[0]}=…: give the name alone; its value is taken from this shell, so that no "
                "secret stands on a command line"
            )
        if name not in os.environ:
            raise ValueError(f"--env {name}: not set in this shell")
        found[name] = os.environ[name]
    store = found.get("MLFLOW_TRACKING_URI", "")
    if store.startswith("sqlite:") and not shared:
        raise ValueError(
            f"MLFLOW_TRACKING_URI={redact(store)}: a file of this machine, which the cluster does not see; use a "
            "server's http address, or unset it"
        )
    return found | {"PYTHONUNBUFFERED": "1", "FACTORY_CODE_VERSION": code_version()}


def runtime_environment(files: Sequence[str], package: Path, variables: Mapping[str, str]) -> dict[str, Any]:
    """Ray's runtime environment: the files' settings in order, then the package and the variables.

    Raises:
        ValueError: a file is no YAML or JSON mapping, or sets `working_dir`.
    """
    import yaml

    merged: dict[str, Any] = {}
    for name in files:
        try:
            found = yaml.safe_load(Path(name).read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"--runtime-env {name}: is neither YAML nor JSON ({error})") from error
        if not isinstance(found, dict):
            raise ValueError(f"--runtime-env {name}: want a mapping of Ray's runtime_env fields")
        if "working_dir" in found:
            raise ValueError(f"--runtime-env {name}: working_dir is the submitted tree; use --working-dir")
        merged |= {key: value for key, value in found.items() if key != "env_vars"}
        merged.setdefault("env_vars", {}).update(found.get("env_vars") or {})
    merged["env_vars"] = {**merged.get("env_vars", {}), **variables}
    return merged | {"working_dir": str(package)}


def describe_environment(variables: Mapping[str, str]) -> str:
    """Names of the variables, with the values of those that are no secrets."""
    shown = []
    for name, value in sorted(variables.items()):
        secret = is_secret_name(name.replace("_", " ").title().replace(" ", "_")) or name.startswith("AWS_")
        shown.append(name if secret else f"{name}={redact(value)}")
    return ", ".join(shown)


def lock_digest(tree: Path) -> str:
    """Digest of the lock files, recorded with the job: which versions the sender expects."""
    digest = hashlib.sha256()
    for path in sorted((tree / "requirements").glob("*.txt")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def is_head_on_this_machine(session_name: str) -> bool:
    """Whether a process of this machine belongs to that Ray session: a forwarded port looks local, too."""
    if not session_name or not sys.platform.startswith("linux"):
        return False
    wanted = session_name.encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if wanted in path.read_bytes():
                return True
        except OSError:
            continue
    return False
