from pathlib import Path

import pytest
from real_table import write_base


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny models are slower on many threads, far slower where the machine is busy."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def random_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base checkpoint of the tiny shape with random weights."""
    return write_base(tmp_path_factory.mktemp("base"))
