"""What several tests share: the session's one Ray, and the optional development data."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """One Ray for the whole session: starting it costs more than most tests."""
    import ray

    from jobs.cluster import connect

    connect(num_cpus=2)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def busi_folder() -> Path:
    """The real BUSI images, where the development data folder lies beside the checkout."""
    folder = SHARED / "data" / "Dataset_BUSI_with_GT"
    if not folder.is_dir():
        pytest.skip("development data folder with Dataset_BUSI_with_GT is not beside the checkout")
    return folder


@pytest.fixture(scope="session")
def breastmnist_file() -> Path:
    """The real BreastMNIST archive, where the development data folder lies beside the checkout."""
    path = SHARED / "data" / "medmnist" / "breastmnist.npz"
    if not path.is_file():
        pytest.skip("development data folder with breastmnist.npz is not beside the checkout")
    return path


@pytest.fixture(scope="session")
def mobilenet_weights() -> Path:
    """Real ImageNet MobileNetV2 weights, where the development data folder lies beside the checkout."""
    path = SHARED / "weights" / "mobilenetv2_100_imagenet.safetensors"
    if not path.is_file():
        pytest.skip("development weights mobilenetv2_100_imagenet.safetensors are not beside the checkout")
    return path


@pytest.fixture(autouse=True)
def tracking_in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs land in the test's own folder, never in the checkout."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
