"""`factory maintain` on the command line."""

import pytest

from factory.storage import open_table
from jobs.cli import main


def test_a_table_is_compacted_and_indexed(real_table: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = open_table(real_table).count()
    assert main(["maintain", real_table]) == 0
    out = capsys.readouterr().out
    assert "fragments" in out and "indexed    image_id, label_name, split" in out
    assert open_table(real_table).count() == before


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["maintain", "nowhere.lance"], "nowhere.lance"),
        (["maintain", "nowhere.lance", "--clean-older-than-days", "-1"], "want 0 or more"),
    ],
)
def test_mistakes_are_named(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert words in capsys.readouterr().err
