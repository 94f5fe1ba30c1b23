"""Settings of the denoising loop are checked before any work."""

import subprocess
import sys

import pytest

from factory.diffusion.sampling import Sampling
from schemas.identity import fingerprint


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"noise_scheduler": "dpm"}, "noise_scheduler='dpm'"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"guidance_scale": 0.5}, "guidance_scale=0.5"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"guidance_start": 0.8, "guidance_stop": 0.2}, "guidance_start=0.8"),
        ({"guidance_stop": 1.5}, "guidance_stop=1.5"),
        ({"eta": 0.5, "noise_scheduler": "euler"}, "eta=0.5"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Sampling(**settings)


def test_every_setting_is_identity() -> None:
    changes = [
        {"noise_scheduler": "unipc"},
        {"num_inference_steps": 21},
        {"guidance_scale": 2.0},
        {"guidance_start": 0.1},
        {"guidance_stop": 0.9},
        {"eta": 0.1},
    ]
    prints = {fingerprint(Sampling(**change)) for change in [{}, *changes]}
    assert len(prints) == 1 + len(changes)


def test_settings_import_without_torch() -> None:
    code = "import sys, factory.diffusion.sampling; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
