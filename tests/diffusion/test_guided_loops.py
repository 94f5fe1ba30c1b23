"""Short denoising loops under each guidance against their golden sums."""

import json
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def test_guided_loops_reproduce_the_golden_sums() -> None:
    """A change that should not alter the maths must reproduce these; else run the script beside the file."""
    sys.path.insert(0, str(GOLDEN))
    from regenerate_guidance import guided_sums

    golden = json.loads((GOLDEN / "guidance.json").read_text())
    sums = guided_sums()
    assert set(sums) == set(golden)
    for name, values in golden.items():
        assert sums[name] == pytest.approx(values, rel=1e-3, abs=1e-2), name
    magnitudes = [values["magnitude"] for values in sums.values()]
    assert len({round(value, 1) for value in magnitudes}) == len(magnitudes), (
        "each guidance does something else"
    )
