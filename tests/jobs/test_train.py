"""`factory train` as a job: local mode, Ray workers, MLflow, going on, refusals."""

import dataclasses
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from real_table import make_rows, write_base, write_real

from factory.training.metrics import read_metrics
from jobs.train import Args, command, make_task, run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One MLflow store: making it takes longer than the runs."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def args(tmp_path: Path, base: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> Args:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.chdir(tmp_path)
    write_real(tmp_path / "real.lance", make_rows())
    overrides = {
        "generator.base": str(base), "generator.resolution": "64", "training.batch-size": "4",
        "training.log-every": "1", "training.checkpoint-every": "2", "training.sample-every": "3",
        "training.validate-every": "3", "training.warmup-steps": "1", "sampling.num-inference-steps": "2",
    }  # fmt: skip
    flags = tuple(text for name, value in overrides.items() for text in (f"--{name}", value))
    return Args(
        recipe="tiny",
        real="real.lance",
        out="generator",
        max_steps=3,
        num_workers=0,
        use_gpu=False,
        overrides=flags,
    )


def test_local_mode_trains_tracks_and_goes_on(args: Args, capsys: pytest.CaptureFixture[str]) -> None:
    import os

    from mlflow import MlflowClient

    summary = run(args)
    assert (summary.start_step, summary.steps) == (0, 3) and summary.model is not None
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    version = client.get_model_version(*summary.model)
    assert version.source == (Path.cwd() / "generator").as_uri()
    tracked = client.get_run(version.run_id)
    assert tracked.data.params["recipe.training.max_steps"] == "3"
    curve = client.get_metric_history(version.run_id, "loss")
    assert [(m.step, m.value) for m in curve] == [
        (line["step"], line["loss"]) for line in read_metrics(Path("generator")) if "loss" in line
    ]
    assert {"val_loss", "grad_norm", "learning_rate", "latent_kl"} <= set(tracked.data.metrics)
    assert [a.path for a in client.list_artifacts(version.run_id)] == ["step-00000003.png"]

    before = (Path("generator") / "generator.json").stat().st_mtime_ns
    assert run(args).model is None  # finished
    assert (Path("generator") / "generator.json").stat().st_mtime_ns == before

    more = run(dataclasses.replace(args, max_steps=4))
    assert (more.start_step, more.steps) == (3, 4) and more.model is not None
    whole_curve = client.get_metric_history(client.get_model_version(*more.model).run_id, "loss")
    assert [m.step for m in whole_curve] == [1, 2, 3, 4]

    changed = dataclasses.replace(args, overrides=(*args.overrides, "--training.seed", "5"))
    with pytest.raises(
        ValueError, match=r"--out .*another identity: training.seed was 0, now 5.*--overwrite"
    ):
        run(changed)
    with pytest.raises(ValueError, match="--max-steps 3: .* is finished at step 4"):
        run(args)
    assert run(dataclasses.replace(changed, overwrite=True, max_steps=1)).steps == 1

    flags = [f"--{name}={getattr(args, name)}" for name in ("recipe", "real", "out")]
    capsys.readouterr()
    assert (
        command([*flags, "--no-use-gpu", "--num-workers", "0", "--max-steps", "1", *changed.overrides]) == 0
    )
    printed = capsys.readouterr().out
    assert "finished already at step 1" in printed and "next: factory synthesize --recipe tiny" in printed


def test_refusals_name_the_option(args: Args) -> None:
    with pytest.raises(ValueError, match="--lora-rank: goes with --adapt-from"):
        make_task(dataclasses.replace(args, lora_rank=4))
    with pytest.raises(ValueError, match="did you mean 'tiny'"):
        run(dataclasses.replace(args, recipe="tinny"))
    with pytest.raises(ValueError, match=r"max_steps: want 1 or more, got 0"):
        run(dataclasses.replace(args, max_steps=0))
    with pytest.raises(ValueError, match="--num-workers: want 0 or more"):
        run(dataclasses.replace(args, num_workers=-1))
    with pytest.raises(ValueError, match=r"batch_size: 4 is not divisible by 3 workers"):
        run(dataclasses.replace(args, num_workers=3))
    with pytest.raises(FileNotFoundError, match="no table at nowhere.lance"):
        run(dataclasses.replace(args, real="nowhere.lance"))
    assert not Path("generator").exists()


@pytest.mark.slow
@pytest.mark.cluster
def test_two_ray_workers_train_as_one_process_does(args: Args, ray_local: None) -> None:
    """Ray Data fills the latent cache, two DDP workers share each batch; the curve is that of one process."""
    args = dataclasses.replace(args, overrides=(*args.overrides, "--training.horizontal-flip"))
    apart = run(dataclasses.replace(args, num_workers=2, cpus_per_worker=1))
    assert apart.steps == 3 and apart.model is not None
    assert list(Path("real.lance.cache").glob("latents-*.lance"))
    run(dataclasses.replace(args, out="alone"))
    one, two = (
        [line for line in read_metrics(Path(folder)) if "loss" in line] for folder in ("alone", "generator")
    )
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert (Path("generator") / "samples" / "step-00000003.png").exists()
