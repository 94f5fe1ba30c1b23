"""The console command: every job as a verb.

    factory --help
    factory VERB --help

Verbs are imported when they run, so that help answers at once. What the operator can put right is one line on
standard error and exit status 2; an unexpected exception keeps its traceback and status 1; Ctrl-C is 130.
FACTORY_TRACEBACK=1 shows the traceback behind an `error:` line.
"""

import difflib
import errno
import importlib
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One word of the command line: where its `command(argv)` is, and what help says of it."""

    module: str
    about: str
    resumes: bool = False
    """Whether running the same command again goes on where it stopped."""


VERBS = {
    "demo": Verb(module="jobs.demo", about="the whole main job in minutes, ending in a report", resumes=True),
    "prepare": Verb(module="jobs.prepare", about="read, verify, split and embed a real dataset into a table"),
    "datasets": Verb(
        module="jobs.datasets", about="public datasets that prepare reads: licence, source, expected folder"
    ),
    "recipes": Verb(module="jobs.recipes", about="list the recipes, or show one in full"),
    "caption": Verb(
        module="jobs.caption", about="describe real images in words, or write new prompts from these"
    ),
    "train": Verb(
        module="jobs.train",
        about="train a recipe's generator, autoencoder, mask model, or a segmenter to judge images",
        resumes=True,
    ),
    "heal": Verb(
        module="jobs.heal", about="paint lesions over, so that real images serve as backgrounds", resumes=True
    ),
    "synthesize": Verb(
        module="jobs.synthesize", about="make annotated images into a synthetic table", resumes=True
    ),
    "status": Verb(
        module="jobs.status", about="how far the plans of a table are, while a job runs or after it died"
    ),
    "curate": Verb(
        module="jobs.curate",
        about="mark duplicates, copies and outliers; say why each was rejected",
        resumes=True,
    ),
    "score": Verb(
        module="jobs.score",
        about="add columns: density, shape, texture, mask fidelity of rows against real images",
        resumes=True,
    ),
    "query": Verb(module="jobs.query", about="filter, search by image, export rows or a contact sheet"),
    "export": Verb(
        module="jobs.export",
        about="write rows, alone or with real ones, for nnU-Net, Hugging Face, WebDataset, COCO or as folders",
    ),
    "release": Verb(
        module="jobs.release",
        about="tag, card, checksums and record of a curated table, or why it may not leave",
    ),
    "explore": Verb(
        module="tune.explore",
        about="which ratio of synthetic data, or which class-adaptive sampler, helps",
        resumes=True,
    ),
    "evaluate": Verb(
        module="jobs.evaluate",
        about="compare with real images, judge once on the test split, write the report",
        resumes=True,
    ),
    "browse": Verb(module="jobs.browse", about="look through a table in a browser, on this machine only"),
    "maintain": Verb(module="jobs.maintain", about="compact a table, index it, remove old versions"),
    "submit": Verb(module="jobs.submit", about="run a verb on a Ray cluster, from this machine"),
    "jobs": Verb(module="jobs.submitted", about="list, follow and stop submitted jobs"),
    "kuberay": Verb(module="jobs.kuberay", about="a verb as a KubeRay RayJob manifest"),
    "reproduce": Verb(module="jobs.reproduce", about="make one row again from its provenance and compare"),
    "doctor": Verb(module="jobs.doctor", about="check this machine and say what to fix"),
}

EXAMPLES = """\
examples:
  factory demo
  factory prepare busi Dataset_BUSI_with_GT --out real.lance
  factory train --recipe tiny --real real.lance --out runs/generator
  factory synthesize --recipe tiny --generator runs/generator --real real.lance \\
      --num-requests 128 --out synthetic.lance
  factory curate synthetic.lance --real real.lance
  factory query synthetic.lance "label_name = 'malignant' AND accepted" --contact-sheet sheet.png
  factory export synthetic.lance --real real.lance --ratio 1 --format nnunet --out mixed

`factory VERB --help` says all about one verb. A new user starts with `factory doctor` and `factory demo`."""

_OPERATOR_ERRNOS = frozenset(
    {
        errno.ENOENT,
        errno.EACCES,
        errno.EPERM,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.EROFS,
        errno.EIO,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.ENAMETOOLONG,
    }
)
_OURS = ("schemas", "factory", "jobs", "tune")
_ROOT = Path(__file__).resolve().parents[1]


def help_text() -> str:
    """What `factory --help` prints."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.about}" for name, verb in VERBS.items())
    return (
        "usage: factory VERB [options]\n\n"
        "Turns a small annotated medical-image dataset into a large, curated, queryable synthetic one.\n\n"
        f"verbs:\n{verbs}\n\n"
        "options:\n  -h, --help     this help\n  --version      version and commit\n\n"
        f"{EXAMPLES}"
    )


def is_operator_error(error: BaseException) -> bool:
    """Whether the operator can put `error` right: bad input that our code named, a file, a full disk.

    A ValueError that comes out of a library, or a subclass that a library defines, is a fault of ours and
    keeps its traceback.
    """
    if isinstance(error, OSError):
        return error.errno in _OPERATOR_ERRNOS or (error.errno is None and _is_raised_here(error))
    is_own_type = type(error) is ValueError or type(error).__module__.split(".")[0] in _OURS
    return isinstance(error, ValueError) and is_own_type and _is_raised_here(error)


def _is_raised_here(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return False
    source = Path(frames[-1].filename)
    return source.is_relative_to(_ROOT) and source.relative_to(_ROOT).parts[0] in _OURS


def run_verb(name: str, argv: Sequence[str]) -> int:
    """Run one verb and turn what it raises into an exit status.

    Returns:
        The verb's own status; 2 for what the operator can put right, 130 after Ctrl-C, 141 where the reader
        of a pipe went away, 1 for an unexpected exception (its traceback is printed).
    """
    verb = VERBS[name]
    # Ray's processes are forked to execute at once, which the warning is not about.
    warnings.filterwarnings("ignore", message="lance is not fork-safe")
    try:
        argv = _without_storage_options(argv)
        status = int(importlib.import_module(verb.module).command(list(argv)) or 0)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        again = f"; to go on: {shlex.join(['factory', name, *argv])}" if verb.resumes else ""
        print(f"\ninterrupted{again}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # `factory query … | head`: keep the interpreter from complaining about it a second time on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        from factory.redaction import redact

        if not is_operator_error(error):
            print(redact(traceback.format_exc()), file=sys.stderr, end="")
            return 1
        if os.environ.get("FACTORY_TRACEBACK"):
            print(redact(traceback.format_exc()), file=sys.stderr, end="")
        print(f"error: {redact(describe(error))}", file=sys.stderr)
        return 2


def _without_storage_options(argv: Sequence[str]) -> list[str]:
    """Every verb takes `--storage-options KEY=VALUE`: they go to the environment, and no job sees or records them."""
    if not any(item.split("=")[0] == "--storage-options" for item in argv):
        return list(argv)
    from factory.storage import take_storage_options

    return take_storage_options(list(argv))


def describe(error: Exception) -> str:
    """One line for an error: the message, with the file and what to do for those the system raised."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    where = f"{error.filename}: " if error.filename is not None else ""
    text = f"{where}{error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT) and "free some space" not in text:
        text += "; free some space and run the same command again"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text())
        return 0 if arguments else 2
    name = arguments[0]
    if name in ("--version", "-V", "version"):
        from factory.version import code_version

        print(f"factory {code_version()}")
        return 0
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1, cutoff=0.5)
        hint = f"did you mean `factory {near[0]}`?" if near else f"there are {', '.join(VERBS)}"
        print(f"error: no verb {name!r}; {hint}", file=sys.stderr)
        return 2
    return run_verb(name, arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
