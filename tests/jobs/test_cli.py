"""The console command: help at once, honest exit codes, errors that say what to do."""

import errno
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from jobs import cli

HEAVY = (
    "torch",
    "ray",
    "mlflow",
    "diffusers",
    "transformers",
    "lance",
    "timm",
    "faiss",
    "skimage",
    "matplotlib",
)


def test_help_imports_nothing_heavy_and_answers_within_a_second() -> None:
    script = (
        "import sys, time, json\nstart = time.perf_counter()\nfrom jobs.cli import main\ncode = main(['--help'])\n"
        f"heavy = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "print(json.dumps({'code': code, 'heavy': heavy, 'seconds': time.perf_counter() - start}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    *text, last = done.stdout.splitlines()
    result = json.loads(last)
    assert result["code"] == 0 and result["heavy"] == [] and result["seconds"] < 1
    for verb in cli.VERBS:
        assert any(line.startswith(f"  {verb} ") for line in text)
    assert any(line.lstrip().startswith("factory synthesize --recipe") for line in text)


def test_every_verb_is_there() -> None:
    names = [
        "prepare",
        "train",
        "synthesize",
        "curate",
        "query",
        "reproduce",
        "browse",
        "explore",
        "evaluate",
        "submit",
        "jobs",
        "recipes",
        "demo",
        "doctor",
    ]
    assert set(names) <= set(cli.VERBS)
    for verb in cli.VERBS.values():
        assert (Path(cli.__file__).parents[1] / f"{verb.module.replace('.', '/')}.py").is_file()


@pytest.mark.parametrize(
    ("typed", "meant"), [("synthesise", "synthesize"), ("trian", "train"), ("doctr", "doctor")]
)
def test_an_unknown_verb_suggests_the_nearest(
    typed: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([typed]) == 2
    assert f"`factory {meant}`" in capsys.readouterr().err


def test_nothing_near_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["zzzz"]) == 2
    assert "prepare, " in capsys.readouterr().err


def test_version_is_that_of_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("factory 0.")


def verb_that(monkeypatch: pytest.MonkeyPatch, source: str, file: str | None = None) -> None:
    """A verb `probe` whose `command` is `source`, compiled as if it stood in `file` of this repository."""
    path = file or str(Path(cli.__file__).parent / "probe.py")
    module = types.ModuleType("jobs.probe")
    exec(compile(source, path, "exec"), module.__dict__)  # noqa: S102 - the frame's file is what is tested
    monkeypatch.setitem(sys.modules, "jobs.probe", module)
    monkeypatch.setitem(cli.VERBS, "probe", cli.Verb(module="jobs.probe", about="", resumes=True))


@pytest.mark.parametrize(
    ("raised", "shown"),
    [
        ("ValueError('--labels: class x is not there')", "error: --labels: class x is not there"),
        ("FileNotFoundError('real.lance: run factory prepare')", "error: real.lance: run factory prepare"),
        ("PermissionError(13, 'Permission denied', 'out')", "error: out: Permission denied"),
        ("NotADirectoryError(20, 'Not a directory', 'a/b')", "error: a/b: Not a directory"),
        ("OSError(28, 'No space left on device', 'x')", "error: x: No space left on device; free some space"),
        ("ConnectionError('no cluster answers at h:1')", "error: no cluster answers at h:1"),
        ("ValueError('https://me:hunter2@host fails')", "error: https://[redacted]@host fails"),
    ],
)
def test_what_the_operator_can_put_right_is_one_line_and_exit_two(
    raised: str, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verb_that(monkeypatch, f"def command(argv):\n    raise {raised}")
    assert cli.main(["probe"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(shown) and len(error.splitlines()) == 1


def test_a_missing_file_met_by_a_library_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verb_that(monkeypatch, "import pathlib\ndef command(argv):\n    pathlib.Path('no/such').read_text()")
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr().err == "error: no/such: No such file or directory\n"


@pytest.mark.parametrize(
    "source",
    [
        "def command(argv):\n    raise RuntimeError('boom')",
        "def command(argv):\n    return {}['boom']",
        "import json\ndef command(argv):\n    json.loads('boom')",
        "import fractions\ndef command(argv):\n    fractions.Fraction('boom')",
        f"def command(argv):\n    raise OSError({errno.EDOM}, 'boom')",
    ],
)
def test_the_unexpected_keeps_its_traceback_and_exit_one(
    source: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verb_that(monkeypatch, source)
    assert cli.main(["probe"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and "error: " not in error.splitlines()[0]


def test_the_traceback_behind_an_error_can_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verb_that(monkeypatch, "def command(argv):\n    raise ValueError('x')")
    monkeypatch.setenv("FACTORY_TRACEBACK", "1")
    assert cli.main(["probe"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and error.splitlines()[-1] == "error: x"


def test_an_interruption_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verb_that(monkeypatch, "def command(argv):\n    raise KeyboardInterrupt")
    assert cli.main(["probe", "--out", "a b"]) == 130
    assert "to go on: factory probe --out 'a b'" in capsys.readouterr().err


@pytest.mark.parametrize(("status", "code"), [("None", 0), ("0", 0), ("1", 1), ("3", 3)])
def test_the_verbs_own_status_is_kept(status: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    verb_that(monkeypatch, f"def command(argv):\n    assert argv == ['-x']\n    return {status}")
    assert cli.main(["probe", "-x"]) == code


def test_a_reader_that_leaves_the_pipe_is_no_error(tmp_path: Path) -> None:
    script = (
        "import sys, types\nfrom jobs import cli\nprobe = types.ModuleType('probe')\n"
        "probe.command = lambda argv: print('x\\n' * 100_000)\nsys.modules['probe'] = probe\n"
        "cli.VERBS['probe'] = cli.Verb(module='probe', about='')\nsys.exit(cli.main(['probe']))"
    )
    (tmp_path / "probe.py").write_text(script)
    command = f"{sys.executable} {tmp_path}/probe.py | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 141 and done.stdout == "x\n" and done.stderr == ""
