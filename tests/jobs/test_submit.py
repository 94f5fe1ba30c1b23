"""`factory submit` and `factory jobs` over HTTP against a real head with token authentication."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "evaluation"))  # planted.py lies there

from planted import write_real, write_synthetic

from factory.storage import open_table
from factory.training.metrics import read_metrics
from jobs.job_server import _Output, server_url
from jobs.submission import (
    SUBMITTABLE,
    describe_environment,
    environment,
    is_head_on_this_machine,
    pack,
    parse_command,
    runtime_environment,
    with_paths,
)
from tests.cluster.local_head import LocalHead

ROOT = Path(__file__).resolve().parents[2]
FACTORY = [sys.executable, "-c", "import sys; from jobs.cli import main; sys.exit(main(sys.argv[1:]))"]
SYNTHESIZE = ["--recipe", "tiny", "--generator", "gen", "--real", "real.lance", "--out", "out.lance"]


@dataclass
class Shell:
    """The command line with a head's address and token in its environment."""

    head: LocalHead
    store: str
    folder: Path

    def environment(self, token: str | None = None) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        variables = {
            "MLFLOW_TRACKING_URI": self.store,
            "RAY_API_SERVER_ADDRESS": self.head.url,
            "PYTHONPATH": path,
        }
        return self.head.environment(token) | variables

    def start(self, *argv: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*FACTORY, *argv], cwd=self.folder, env=self.environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *argv: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*FACTORY, *argv], cwd=self.folder, env=self.environment(token), capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    folder = tmp_path_factory.mktemp("laptop")
    with LocalHead() as head:
        yield Shell(head=head, store=f"sqlite:///{folder}/mlflow.db", folder=folder)


def _submitted_train(shell: Shell) -> None:
    assert [line["step"] for line in read_metrics(shell.folder / "trained") if "loss" in line] == [1, 2]
    assert (shell.folder / "trained" / "generator.json").is_file()


def _submitted_synthesize(shell: Shell) -> None:
    table = open_table(str(shell.folder / "s.lance")).read(["request_id", "code_version"])
    assert table.num_rows == len(set(table["request_id"].to_pylist())) == 6


def _submitted_curate(shell: Shell) -> None:
    accepted = open_table(str(shell.folder / "s.lance")).read(["accepted"])["accepted"].to_pylist()
    assert len(accepted) == 6 and None not in accepted


def _submitted_explore(shell: Shell) -> None:
    found = json.loads((shell.folder / "explored" / "results.json").read_text())
    assert len(found["searches"]["fixed-seed-0"]["epochs"]) == 1


VERBS = {
    "train": (
        "--recipe tiny --real {real} --out trained --max-steps 2 --num-workers 0 --no-use-gpu --training.batch-size 2 "
        "--training.log-every 1 --training.sample-every 0 --training.validate-every 0 --training.max-rows 4",
        _submitted_train,
    ),
    "synthesize": (
        "--recipe tiny --generator {generator} --real {real} --out s.lance --num-requests 6 --batch-size 3 "
        "--sampling.num-inference-steps 2",
        _submitted_synthesize,
    ),
    "curate": ("s.lance --real {real} --no-copy-test --num-threads 1", _submitted_curate),
    "explore": (
        "sampler --real {planted}/real.lance --synthetic {planted}/good.lance --out explored --policy fixed "
        "--initial-count 1 --epochs 1 --episodes 1 --steps-per-epoch 2 --real-per-batch 4 --size 32",
        _submitted_explore,
    ),
}
"""What is run over HTTP: arguments of a verb, relative to the laptop's folder, and what must have come of it."""


@pytest.fixture(scope="module")
def submitted(
    shell: Shell, real_table: str, generator_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, subprocess.CompletedProcess[str]]:
    """What each verb's submission said. The first runs beside the others: most of each is imports."""
    planted = tmp_path_factory.mktemp("planted")
    rows = write_real(planted / "real.lance", {"train": 16, "val": 40, "test": 4}, 0)
    write_synthetic(planted / "good.lance", rows, 40, 5)

    def argv(verb: str) -> list[str]:
        return VERBS[verb][0].format(real=real_table, generator=generator_folder, planted=planted).split()

    first, *others = VERBS
    beside = shell.start("submit", "--job-id", f"the-{first}", first, *argv(first))
    done = {verb: shell.run("submit", "--job-id", f"the-{verb}", verb, *argv(verb)) for verb in others}
    out, err = beside.communicate(timeout=240)
    return done | {first: subprocess.CompletedProcess([], beside.returncode, out, err)}


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_runs_on_the_cluster(
    verb: str, shell: Shell, submitted: dict[str, subprocess.CompletedProcess[str]]
) -> None:
    done = submitted[verb]
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "sends " in done.stdout and " MB, to http://127.0.0.1" in done.stdout
    assert f"job the-{verb} succeeded, exit status 0" in done.stdout
    assert "wrote" in done.stdout, "the job's own output comes back"
    VERBS[verb][1](shell)


@pytest.mark.slow
@pytest.mark.cluster
def test_jobs_are_listed_with_status_logs_and_the_exit_status_of_a_failure(
    shell: Shell, real_table: str
) -> None:
    failing = ["curate", "missing.lance", "--real", real_table]
    failed = shell.run("submit", "--job-id", "fails", *failing)
    assert failed.returncode == 2, "a missing table is exit status 2, on the cluster as here"
    assert "no table at" in failed.stdout and "job fails failed, exit status 2" in failed.stdout
    again = shell.run("submit", "--job-id", "fails", *failing)
    assert again.returncode == 2 and "already" in again.stderr and len(again.stderr.splitlines()) == 1
    listed = {job["id"]: job for job in json.loads(shell.run("jobs", "list", "--json").stdout)}
    assert listed["fails"]["status"] == "FAILED" and "factory curate" in listed["fails"]["command"]
    status = shell.run("jobs", "status", "fails")
    assert status.returncode == 2 and "FAILED" in status.stdout
    logs = shell.run("jobs", "logs", "fails")
    assert logs.returncode == 0 and "no table at" in logs.stdout
    unknown = shell.run("jobs", "logs", "nowhere")
    assert unknown.returncode == 2 and "factory jobs list" in unknown.stderr


@pytest.mark.soak
@pytest.mark.cluster
def test_interrupt_leaves_the_job_and_stop_ends_it(shell: Shell, real_table: str) -> None:
    argv = f"--recipe tiny --real {real_table} --out long --max-steps 100000 --num-workers 0 --no-use-gpu".split()
    with shell.start("submit", "--job-id", "long", "train", *argv) as following:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and "Running entrypoint" not in (following.stdout.readline()):  # type: ignore[union-attr]
            assert following.poll() is None
        following.send_signal(signal.SIGINT)
        assert following.wait(30) == 130
        said = following.stderr.read()  # type: ignore[union-attr]
    assert "detached: long goes on" in said and "factory jobs logs long --follow" in said
    assert "RUNNING" in shell.run("jobs", "status", "long").stdout
    assert shell.run("jobs", "stop", "long").returncode == 0
    assert shell.run("jobs", "status", "long").returncode == 143
    with_no_wait = shell.run(
        "submit", "--no-wait", "--job-id", "short", "curate", "x.lance", "--real", real_table
    )
    assert with_no_wait.returncode == 0 and "factory jobs logs short --follow" in with_no_wait.stdout
    assert shell.run("jobs", "logs", "short", "--follow").returncode == 2


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize("token", ["0" * 32, ""])
def test_a_client_without_the_token_is_refused_in_one_line(shell: Shell, token: str, tmp_path: Path) -> None:
    env = shell.environment(token) | {"HOME": str(tmp_path)}
    if not token:
        del env["RAY_AUTH_TOKEN"], env["RAY_AUTH_MODE"]
    done = subprocess.run(
        [*FACTORY, "submit", "curate", "a.lance", "--real", "b.lance"], cwd=tmp_path, env=env, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    refusals = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(refusals) == 1 and "RAY_AUTH_TOKEN" in refusals[0]
    assert shell.head.token not in done.stderr + done.stdout


# ------------------------------------------------------------------------------------------ without a head


def test_every_submittable_verb_names_fields_that_its_arguments_have() -> None:
    import dataclasses
    import importlib

    from jobs.cli import VERBS as ALL

    for name, described in SUBMITTABLE.items():
        assert name.split()[0] in ALL
        module = importlib.import_module(described.module or f"jobs.{name}")
        fields = {field.name for field in dataclasses.fields(module.Args)}
        assert {*described.paths, *described.positionals, *described.folders} <= fields
        assert set(described.folders) <= set(described.paths)


@pytest.mark.parametrize(
    ("verb", "argv", "message"),
    [
        ("synthesize", ["--recipe", "tinny", *SYNTHESIZE[2:]], "did you mean 'tiny'"),
        ("synthesize", [*SYNTHESIZE, "--balence"], "did you mean --balance"),
        ("synthesize", [*SYNTHESIZE, "--address", "auto"], "joins the cluster it is submitted to"),
        (
            "train",
            ["--recipe", "tiny", "--real", "r", "--out", "o", "--num-cpus", "4"],
            "--num-cpus of train",
        ),
        (
            "train",
            ["--recipe", "tiny", "--real", "s3://b/r.lance", "--out", "s3://b/run"],
            "--out s3://b/run: plain files",
        ),
        ("browse", [], "cannot be submitted"),
        ("explore", [], "'explore' cannot be submitted; .* explore ratio, explore sampler"),
        ("explore", ["ration"], "'explore ration' cannot be submitted"),
        (
            "explore",
            ["sampler", "--real", "r", "--synthetic", "s", "--out", "o", "--num-cpus", "4"],
            "--num-cpus of explore",
        ),
    ],
)
def test_bad_arguments_fail_before_anything_is_sent(verb: str, argv: Sequence[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_command(verb, argv, ROOT)


def test_a_value_of_the_wrong_type_fails_before_anything_is_sent() -> None:
    with pytest.raises(SystemExit):
        parse_command("synthesize", [*SYNTHESIZE, "--num-requests", "many"], ROOT)
    with pytest.raises(SystemExit):
        parse_command("synthesize", [*SYNTHESIZE, "--sampling.num-inference-steps", "few"], ROOT)
    with pytest.raises(SystemExit):  # neither --synthetic nor --fold-table
        parse_command("explore", ["ratio", "--real", "r", "--task", "classification", "--out", "o"], ROOT)


def test_a_command_comes_out_as_it_was_meant() -> None:
    argv = ["--recipe=tiny", "--real", "s3://b/r.lance", "--out", "/shared/my run", "--no-use-gpu", "--overwrite",
            "--training.batch-size", "2"]  # fmt: skip
    command = parse_command("train", argv, ROOT)
    assert parse_command("train", command.argv(), ROOT) == command
    assert command.entrypoint().startswith("python -m jobs.cli train ")
    assert "'/shared/my run'" in command.entrypoint()
    positional = parse_command("curate", ["--real", "r.lance", "--no-copy-test", "s.lance"], ROOT)
    assert positional.argv() == ["s.lance", "--real", "r.lance", "--no-copy-test"]
    adapted = parse_command("synthesize", [*SYNTHESIZE, "--adapters", "a", "b"], ROOT)
    assert parse_command("synthesize", adapted.argv(), ROOT).args.adapters == ("a", "b")


def test_local_paths_are_refused_where_the_cluster_cannot_see_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = parse_command("synthesize", SYNTHESIZE, ROOT)
    with pytest.raises(ValueError, match=r"--generator gen: .*--allow-local-paths"):
        with_paths(command, tree=ROOT, sent=(), shared=False)
    placed = with_paths(command, tree=ROOT, sent=(), shared=True)
    assert (placed.args.real, placed.args.out) == (f"{tmp_path}/real.lance", f"{tmp_path}/out.lance")
    assert placed.args.recipe == "tiny"
    remote = [
        "--recipe",
        "tiny",
        "--generator",
        "s3://b/g",
        "--real",
        "s3://b/r.lance",
        "--out",
        "s3://b/o.lance",
    ]
    stays = parse_command("synthesize", remote, ROOT)
    assert with_paths(stays, tree=ROOT, sent=(), shared=False) == stays
    in_tree = parse_command("curate", ["s3://b/o.lance", "--real", str(ROOT / "docs" / "real")], ROOT)
    sent = with_paths(in_tree, tree=ROOT, sent=("docs/real/data.bin",), shared=False)
    assert sent.args.real == "docs/real", "what is sent is named from the tree's root"


def test_explore_is_placed_like_the_other_verbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mobilenetv2_100").mkdir()  # a model's name stays one, whatever lies here
    words = ["ratio", "--real", "r.lance", "--fold-table", "0=a.lance", "1=s3://b/c.lance", "--task", "classification",
             "--model", "mobilenetv2_100", "--where", "", "area > 20", "--out", "found"]  # fmt: skip
    command = parse_command("explore", words, ROOT)
    with pytest.raises(ValueError, match=r"--real r.lance: .*--allow-local-paths"):
        with_paths(command, tree=ROOT, sent=(), shared=False)
    placed = with_paths(command, tree=ROOT, sent=(), shared=True)
    assert placed.args.fold_table == (f"0={tmp_path}/a.lance", "1=s3://b/c.lance")
    assert (placed.args.real, placed.args.out) == (f"{tmp_path}/r.lance", f"{tmp_path}/found")
    assert placed.args.model == ("mobilenetv2_100",) and placed.args.where == ("", "area > 20")
    assert placed.entrypoint().startswith("python -m jobs.cli explore ratio ")
    assert parse_command("explore", ["ratio", *placed.argv()], ROOT) == placed


def test_an_override_that_names_a_local_file_is_placed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vae").mkdir()
    argv = [*SYNTHESIZE, "--generator.vae", "vae", "--sampling.num-inference-steps=3"]
    command = parse_command("synthesize", argv, ROOT)
    placed = with_paths(command, tree=ROOT, sent=(), shared=True)
    assert placed.overrides == ("--generator.vae", f"{tmp_path}/vae", "--sampling.num-inference-steps=3")


def test_the_package_leaves_out_what_is_ignored_and_keeps_the_program(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("jobs/cli.py", "factory/assets/w.bin", "real.lance/data/x.lance", "runs/mlflow.db", ".git/HEAD",
                 "ignored/a.txt", ".env", "host.pem", "sub/__pycache__/x.pyc", "sub/kept.py"):  # fmt: skip
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(name)
    (tree / ".gitignore").write_text("ignored/\n")
    package = pack(tree, tmp_path)
    assert set(package.files) == {".gitignore", "jobs/cli.py", "factory/assets/w.bin", "sub/kept.py"}
    with zipfile.ZipFile(package.path) as archive:
        assert archive.read("sub/kept.py") == b"sub/kept.py"
    with pytest.raises(ValueError, match="does not hold jobs/cli.py"):
        pack(tmp_path / "tree" / "sub", tmp_path)


def test_this_checkout_packs_small(tmp_path: Path) -> None:
    package = pack(ROOT, tmp_path)
    assert "factory/recipes/tiny.py" in package.files and package.megabytes < 50
    assert not [n for n in package.files if n.startswith((".git/", "runs/", ".venv/")) or ".lance/" in n]


def test_variables_go_by_name_and_secrets_are_never_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@host:5000")
    assert "AWS_SECRET_ACCESS_KEY" not in environment((), shared=False)
    variables = environment(("AWS_SECRET_ACCESS_KEY",), shared=False)
    assert variables["AWS_SECRET_ACCESS_KEY"] == "hunter2"
    shown = describe_environment(variables)
    assert "hunter2" not in shown and "AWS_SECRET_ACCESS_KEY" in shown and "host:5000" in shown
    with pytest.raises(ValueError, match="--env NO_SUCH_NAME: not set"):
        environment(("NO_SUCH_NAME",), shared=False)
    with pytest.raises(ValueError, match="--env AWS_SECRET_ACCESS_KEY=…: give the name alone"):
        environment(("AWS_SECRET_ACCESS_KEY=hunter2",), shared=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs/mlflow.db")
    with pytest.raises(ValueError, match="the cluster does not see"):
        environment((), shared=False)


def test_runtime_environments_are_merged_and_checked(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.json"
    one.write_text("pip: [a]\nenv_vars: {A: '1', B: '1'}\n")
    two.write_text('{"env_vars": {"B": "2"}}')
    merged = runtime_environment([str(one), str(two)], tmp_path / "t.zip", {"C": "3"})
    assert merged == {
        "pip": ["a"],
        "env_vars": {"A": "1", "B": "2", "C": "3"},
        "working_dir": f"{tmp_path}/t.zip",
    }
    two.write_text("working_dir: elsewhere")
    with pytest.raises(ValueError, match="use --working-dir"):
        runtime_environment([str(two)], tmp_path / "t.zip", {})
    two.write_text("- a list")
    with pytest.raises(ValueError, match="want a mapping"):
        runtime_environment([str(two)], tmp_path / "t.zip", {})


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert server_url(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert server_url(None) == "http://127.0.0.1:8265", "that is no job server"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://head:8265/")
    assert server_url(None) == "http://head:8265"
    assert server_url("https://other:1") == "https://other:1"
    with pytest.raises(ValueError, match="--address auto"):
        server_url("auto")


def test_a_log_that_is_read_again_is_written_once() -> None:
    written: list[str] = []
    output = _Output(written.append)
    for pieces in (["ab", "cd"], ["a", "bcde"], ["abcdefg"], ["ab"]):
        output.begin()
        for piece in pieces:
            output.take(piece)
    assert "".join(written) == "abcdefg"


def test_only_a_session_of_this_machine_is_here() -> None:
    assert not is_head_on_this_machine("session_2001-01-01_00-00-00_000000_1")
    assert not is_head_on_this_machine("")
