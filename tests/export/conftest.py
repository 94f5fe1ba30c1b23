"""The two tables, made once per session."""

import pytest
from export_tables import write_real, write_synthetic


@pytest.fixture(scope="session")
def synthetic_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """60 synthetic rows, curated."""
    return write_synthetic(tmp_path_factory.mktemp("synthetic"))


@pytest.fixture(scope="session")
def real_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """30 real rows in three splits."""
    return write_real(tmp_path_factory.mktemp("real"))
