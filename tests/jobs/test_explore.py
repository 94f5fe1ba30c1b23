import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "evaluation"))  # planted.py lies there

from planted import write_real, write_synthetic

from tune.explore import command


def _words(folder: Path, *more: str) -> list[str]:
    return [
        "ratio", "--real", str(folder / "real.lance"), "--synthetic", str(folder / "good.lance"),
        "--task", "classification", "--model", "small_cnn?width=8", "--ratios", "0,4", "--seeds", "1", "--folds", "2",
        "--size", "24", "--num-steps", "40", "--learning-rate", "5e-3", "--validate-every", "20",
        "--augmentation", "none", "--cpus-per-trial", "0.5", "--out", str(folder / "out"), *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("explore")
    real = write_real(path / "real.lance", {"train": 16, "val": 40, "test": 4}, 0)
    write_synthetic(path / "good.lance", real, 40, 5)
    return path


def test_the_verb_searches_records_and_answers(
    folder: Path, ray_local: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    from factory.storage import test_accesses as recorded_accesses

    assert command(_words(folder)) == 0
    printed = capsys.readouterr()
    assert printed.out.index("smallest detectable change") < printed.out.index("chosen by")
    assert "trial 4/4" in printed.err
    found = json.loads((folder / "out" / "results.json").read_text())
    assert len(found["trials"]) == 4 and all(trial["score"] is not None for trial in found["trials"])
    assert found["chosen"]["name"] == "synthetic 4×" and found["synthetic"][0]["recipe"] == "planted"
    assert (folder / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert recorded_accesses(str(folder / "real.lance")) == []
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    parent = [run for run in runs if run.info.run_name == "explore ratio"]
    nested = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent[0].info.run_id]
    assert len(parent) == 1 and len(nested) == 4
    assert sorted(run.data.metrics["score"] for run in nested) == sorted(t["score"] for t in found["trials"])
    assert parent[0].data.tags["chosen"] == "synthetic 4×"


@pytest.mark.soak
def test_vectors_are_suggested_with_real_data_only_among_them(
    folder: Path, ray_local: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    words = [
        *_words(folder),
        "--search",
        "optuna",
        "--num-trials",
        "3",
        "--trial-scheduler",
        "asha",
        "--out",
        out,
    ]
    assert command(words) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    names = {trial["arm"] for trial in found["trials"]}
    assert "real" in names and any("striped" in name for name in names)
    assert all(trial["score"] is not None for trial in found["trials"] if trial["arm"] == "real")


def test_errors_come_before_ray(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["--help"]) == 0 and "explore ratio" in capsys.readouterr().out
    assert command([]) == 2
    with pytest.raises(ValueError, match="there are ratio and sampler"):
        command(["ration"])
    with pytest.raises(ValueError, match=r"wants 80 row\(s\)"):
        command(_words(folder, "--per-class", "bright=10"))
