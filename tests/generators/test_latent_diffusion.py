"""The component and its checkpoints' digests, without torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from random_generators import mask_generator

from factory.generators.checkpoints import check_recipe, digest_base, digest_part, part_files, read_manifest
from factory.generators.conditioning import TextAndMask, TextOnly
from factory.generators.latent_diffusion import LatentDiffusion, Trainable
from schemas.identity import fingerprint


def test_where_the_base_lies_is_not_identity() -> None:
    here, there = (
        LatentDiffusion(base="tiny", resolution=128),
        LatentDiffusion(base="/models/sd", resolution=128),
    )
    assert fingerprint(here) == fingerprint(there)
    assert fingerprint(here) != fingerprint(LatentDiffusion(base="tiny", resolution=256))
    assert fingerprint(here) != fingerprint(LatentDiffusion(resolution=128, conditioning=TextOnly()))
    assert fingerprint(here) != fingerprint(LatentDiffusion(resolution=128, trainable=Trainable(lora_rank=4)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LatentDiffusion(resolution=100), "resolution=100"),
        (lambda: LatentDiffusion(resolution=0), "resolution=0"),
        (lambda: Trainable(unet="adapter"), "unet='adapter'"),
        (lambda: Trainable(lora_rank=0), "lora_rank=0"),
        (lambda: TextAndMask(num_mask_classes=0), "num_mask_classes=0"),
        (
            lambda: LatentDiffusion(trainable=Trainable(unet="frozen", controlnet=False)),
            "nothing would be trained",
        ),
        (lambda: LatentDiffusion(conditioning=TextOnly(), trainable=Trainable(unet="frozen")), "nothing"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_a_base_that_cannot_be_found_says_what_to_give(tmp_path: Path) -> None:
    for name in (str(tmp_path / "none"), "./none", "none"):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            LatentDiffusion(base=name).base_folder()
    with pytest.raises(FileNotFoundError, match="hub could not serve"):  # the test session is offline
        LatentDiffusion(base="nobody-at-all/no-such-model").base_folder()


def test_digest_follows_the_bytes(base: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(base, tmp_path / "copy")
    assert digest_base(copy) == digest_base(base)
    (copy / "README.md").write_text("not a weight")
    assert digest_base(copy) == digest_base(base)
    path = part_files(copy, "vae")[-1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert digest_part(copy, "vae") != digest_part(base, "vae")
    assert digest_part(copy, "unet") == digest_part(base, "unet")
    assert digest_base(copy) != digest_base(base)


def test_digests_need_no_torch(base: Path) -> None:
    code = (
        "import sys; from factory.generators.latent_diffusion import LatentDiffusion; "
        "weights = LatentDiffusion(base=sys.argv[1], resolution=64).weights(); "
        "assert list(weights) == ['base'] and len(weights['base']) == 32; "
        "sys.exit('torch was imported' if {'torch', 'diffusers', 'transformers'} & set(sys.modules) else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(base)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_manifest_names_recipe_and_what_it_was_built_on(base: Path, tmp_path: Path) -> None:
    generator = mask_generator(base)
    generator.load().save(tmp_path, {"name": "tiny", "steps": 7, "labels": ["benign", "malignant"]})
    manifest = read_manifest(tmp_path)
    assert manifest["recipe"] == {"name": "tiny", "steps": 7, "labels": ["benign", "malignant"]}
    assert manifest["built_on"] == {"base": digest_base(base)}
    check_recipe(tmp_path, "tiny")
    with pytest.raises(ValueError, match="'tiny', asked for with recipe 'clinical_prior'"):
        check_recipe(tmp_path, "clinical_prior")
    weights = generator.weights(tmp_path)
    assert set(weights) == {"base", "unet_lora", "controlnet"}


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"generator\.json"):
        read_manifest(tmp_path)
    (tmp_path / "generator.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        read_manifest(tmp_path)
    (tmp_path / "generator.json").write_text(json.dumps({"recipe": {}}))
    with pytest.raises(ValueError, match="built_on"):
        read_manifest(tmp_path)
