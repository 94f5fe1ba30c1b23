"""One base of random weights for the whole session."""

from pathlib import Path

import pytest
from random_generators import random_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_base(tmp_path_factory.mktemp("base") / "random")
