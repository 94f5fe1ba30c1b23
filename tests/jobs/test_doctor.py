"""The doctor names what is wrong and what to do, and does not call a sound machine ill."""

import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jobs import doctor


def only(checks: Iterator[doctor.Check]) -> doctor.Check:
    (check,) = checks
    return check


def test_this_environment_is_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[doctor.Check] = []
    diagnosis = doctor.run(doctor.Args(runs=str(tmp_path / "runs")), report=seen.append)
    assert tuple(seen) == diagnosis.checks
    assert not diagnosis.failed, [c for c in diagnosis.checks if c.status == "fail"]
    names = {check.name for check in diagnosis.checks}
    assert {
        "python",
        "packages",
        "torch",
        "torchvision",
        "GPU in torch",
        "GPU in faiss",
        "ray",
        "disk",
    } <= names
    assert {"mlflow store", "model hub", "tiny base", "tiny embedder", "memory", "runs folder"} <= names


@pytest.mark.parametrize(
    ("loaded", "installed", "status"),
    [
        ("2.15.0+cu132", "2.15.0", "ok"),
        ("2.15.0+cpu", "2.15.0+cpu", "warn"),
        ("2.13.0+cpu", "2.13.0+cpu", "fail"),
        ("2.14.0", "2.14.0", "fail"),
    ],
)
def test_torch_must_be_the_ordinary_build_that_torchvision_wants(
    loaded: str, installed: str, status: str
) -> None:
    check = only(doctor.torch_build(loaded, installed, ["numpy", "torch==2.15.0"]))
    assert check.status == status
    assert (check.fix == "") == (status == "ok")
    assert loaded.split("+")[0] in check.detail


def test_a_package_outside_its_range_or_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    required = ["numpy>=999", "no-such-package>=1", "pillow>=1", "gradio>=999; extra == 'browse'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: required)
    check = only(doctor.check_packages())
    assert check.status == "fail" and "make setup" in check.fix
    assert "is outside >=999" in check.detail and "no-such-package is missing" in check.detail
    assert "pillow" not in check.detail and "gradio" not in check.detail


def test_a_path_that_cannot_be_written_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check = only(doctor.check_runs(str(tmp_path / "file" / "runs")))
    assert check.status == "fail" and "Not a directory" in check.detail and "--runs" in check.fix


def test_a_full_disk_fails_and_a_filling_one_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for gigabytes in (0.5, 5, 50):
        usage = shutil.disk_usage(tmp_path)._replace(free=int(gigabytes * 1e9))
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path, usage=usage: usage)
        found.append(list(doctor.check_runs(str(tmp_path)))[1].status)
    assert found == ["fail", "warn", "ok"]


def test_shipped_weights_that_are_missing_cut_or_pointers_fail(tmp_path: Path) -> None:
    assert "no weights there" in only(doctor.shipped_weights("base", tmp_path)).detail
    path = tmp_path / "unet" / "model.safetensors"
    path.parent.mkdir()
    save_file({"weight": np.arange(1000, dtype=np.float32)}, path)
    sound = only(doctor.shipped_weights("base", tmp_path))
    assert sound.status == "ok" and "digest" in sound.detail
    save_file({"weight": np.ones(1000, np.float32)}, path)
    assert only(doctor.shipped_weights("base", tmp_path)).detail != sound.detail, (
        "the digest follows the bytes"
    )
    path.write_bytes(path.read_bytes()[:500])
    assert only(doctor.shipped_weights("base", tmp_path)).status == "fail"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in only(doctor.shipped_weights("base", tmp_path)).detail


@pytest.fixture
def web_server() -> Iterator[str]:
    class Page(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            """Keep the test's output clean."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_the_hub_is_asked_and_being_offline_is_not_a_fault(
    web_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", web_server)
    assert only(doctor.check_hub(2.0)).detail.startswith("127.0.0.1 answers")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    offline = only(doctor.check_hub(2.0))
    assert (
        offline.status == "warn"
        and "not reachable" in offline.detail
        and "`tiny` brings its own" in offline.fix
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert only(doctor.check_hub(2.0)).status == "ok"


def test_an_unreachable_store_fails_with_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:9")
    check = only(doctor._guarded("mlflow store", doctor.check_tracking))
    assert check.status == "fail" and "127.0.0.1:9" in check.detail and "hunter2" not in check.detail


def test_the_command_counts_and_exits_one_on_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("")
    assert doctor.command(["--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False and found["counts"]["fail"] >= 1
    failed = [check for check in found["checks"] if check["status"] == "fail"]
    assert any(check["name"] == "runs folder" and check["fix"] for check in failed)


def test_ray_is_started_on_request(ray_local: None) -> None:
    check = only(doctor.check_ray(start=True))
    assert check.status == "ok" and "CPUs" in check.detail
