"""`factory train --part`: VAE, mask GAN and mask DDPM trained by the job, resumed, refused, and used."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from real_table import make_rows, write_base, write_real
from safetensors.torch import load_file

from factory.sources.mask_models import CurvatureGAN, MaskDiffusion
from factory.training.metrics import read_metrics
from jobs.recipe_args import parse_recipe
from jobs.train import Args, command, run

GAN = (
    "masks:curvature-gan", "--masks.model.resolution", "32", "--masks.model.channels", "16",
    "--masks.model.base-size", "4", "--masks.model.min-channels", "8", "--masks.model.spade-hidden", "8",
    "--masks.model.discriminator-channels", "8", "--masks.model.noise-dim", "8",
    "--masks.model.training.batch-size", "4", "--masks.model.training.log-every", "1",
    "--masks.model.training.checkpoint-every", "2", "--masks.model.training.validate-every", "2",
    "--masks.model.training.sample-every", "2",
)  # fmt: skip
DDPM = (
    "masks:mask-diffusion", "--masks.model.resolution", "16", "--masks.model.channels", "8", "16",
    "--masks.model.norm-groups", "4", "--masks.model.layers-per-block", "1", "--masks.model.num-inference-steps", "3",
    "--masks.model.training.batch-size", "4", "--masks.model.training.log-every", "1",
)  # fmt: skip
VAE = (
    "--generator.resolution", "64", "--vae-stage.training.batch-size", "4", "--vae-stage.training.log-every", "1",
    "--vae-stage.training.validate-every", "2", "--vae-stage.training.sample-every", "2",
    "--vae-stage.training.learning-rate", "1e-4", "--vae-stage.training.warmup-steps", "0",
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def args(tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> Args:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.chdir(tmp_path)
    write_real(tmp_path / "real.lance", make_rows())
    return Args(
        recipe="tiny", real="real.lance", out="out", part="mask_gan", max_steps=2, num_workers=0, use_gpu=False,
        overrides=GAN,
    )  # fmt: skip


def test_the_mask_gan_goes_on_bit_equal_and_draws(args: Args, capsys: pytest.CaptureFixture[str]) -> None:
    summary = run(args)
    assert (summary.start_step, summary.steps) == (0, 2) and summary.model == ("mask_gan-tiny", "1")
    assert {path.name for path in Path("out").iterdir()} == {
        "checkpoints", "mask_model.json", "metrics.jsonl", "model.safetensors", "samples", "training.json",
    }  # fmt: skip
    first = parse_recipe("tiny", (*GAN, "--masks.checkpoint", "out")).masks
    assert isinstance(first, CurvatureGAN)
    digest = first.weights()
    assert run(dataclasses.replace(args, max_steps=4)).start_step == 2
    assert first.weights() != digest, "longer training is another model"
    run(dataclasses.replace(args, max_steps=4, out="whole"))
    one, other = (load_file(Path(folder) / "model.safetensors") for folder in ("out", "whole"))
    assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
    manifest = json.loads(Path("out/mask_model.json").read_text())
    assert (
        manifest["kind"] == "mask_gan"
        and manifest["classes"] == ["benign", "malignant"]
        and manifest["steps"] == 4
    )
    values = read_metrics(Path("out"))[-1]
    assert {"val_box_iou", "val_ripple"} <= set(values) and Path("out/samples/step-00000004.png").exists()

    capsys.readouterr()
    words = [
        "--recipe=tiny",
        "--real=real.lance",
        "--out=out",
        "--part=mask_gan",
        "--no-use-gpu",
        "--max-steps=4",
    ]
    assert command([*words, "--num-workers=0", *GAN]) == 0
    printed = capsys.readouterr().out
    assert "finished already at step 4" in printed and "--masks.checkpoint out" in printed
    changed = (*GAN, "--masks.model.curvature-weight", "0.5")
    with pytest.raises(ValueError, match=r"another identity: component.curvature_weight was 1.0, now 0.5"):
        run(dataclasses.replace(args, overrides=changed))
    assert run(dataclasses.replace(args, overrides=changed, overwrite=True)).steps == 2


def test_the_mask_ddpm_is_trained_and_found(args: Args) -> None:
    assert run(dataclasses.replace(args, part="mask_diffusion", overrides=DDPM)).steps == 2
    source = parse_recipe("tiny", (*DDPM, "--masks.checkpoint", "out")).masks
    assert isinstance(source, MaskDiffusion) and set(source.weights()) == {"mask_diffusion"}


def test_the_vae_is_trained_and_the_generator_uses_it(args: Args, base: Path) -> None:
    given = ("--generator.base", str(base), *VAE)
    args = dataclasses.replace(args, part="vae", out="tuned", overrides=given)
    assert run(args).steps == 2
    assert {"vae", "vae.json", "samples"} <= {path.name for path in Path("tuned").iterdir()}
    assert read_metrics(Path("tuned"))[-1].keys() >= {"val_loss", "val_latent_std"}
    generator = parse_recipe("tiny", (*given, "--generator.vae", "tuned")).generator
    plain = parse_recipe("tiny", given).generator
    assert set(generator.ground()) == {"base", "vae"} and set(plain.ground()) == {"base"}
    loaded, before = generator.load(), plain.load()
    assert loaded.vae.config.scaling_factor == before.vae.config.scaling_factor
    moved = [
        name
        for name, value in loaded.vae.state_dict().items()
        if not np.array_equal(value, before.vae.state_dict()[name])
    ]
    assert len(moved) > 20
    assert run(args).model is None  # finished


def test_refusals_come_before_any_work(args: Args, base: Path) -> None:
    with pytest.raises(
        ValueError, match="takes its masks from DeformedEllipse; choose the source with masks:curvature-gan"
    ):
        run(dataclasses.replace(args, overrides=()))
    with pytest.raises(
        ValueError, match="takes its masks from CurvatureGAN; choose the source with masks:mask-diffusion"
    ):
        run(dataclasses.replace(args, part="mask_diffusion"))
    with pytest.raises(ValueError, match="--num-workers 2: the mask GAN trains in one process"):
        run(dataclasses.replace(args, num_workers=2))
    with pytest.raises(
        ValueError, match="--part mask_gan: --adapt-from and --lora-rank are of the generator"
    ):
        run(dataclasses.replace(args, lora_rank=4))
    with pytest.raises(ValueError, match=r"batch_size: 4 is not divisible by 3 workers"):
        given = ("--generator.base", str(base), *VAE)
        run(dataclasses.replace(args, part="vae", num_workers=3, overrides=given))
    write_real(Path("bare.lance"), make_rows(with_masks=False))
    with pytest.raises(ValueError, match="--real .*bare.lance: no training row has a mask"):
        run(dataclasses.replace(args, real="bare.lance"))
    Path("foreign").mkdir()
    Path("foreign/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"--out .*foreign: holds other files \(notes.txt"):
        run(dataclasses.replace(args, out="foreign", overwrite=True))
    assert Path("foreign/notes.txt").read_text() == "mine" and not Path("out").exists()


@pytest.mark.soak
@pytest.mark.cluster
def test_two_ray_workers_train_the_vae_as_one_process_does(args: Args, base: Path, ray_local: None) -> None:
    given = ("--generator.base", str(base), *VAE)
    args = dataclasses.replace(args, part="vae", overrides=given)
    assert run(dataclasses.replace(args, out="apart", num_workers=2, cpus_per_worker=1)).steps == 2
    run(dataclasses.replace(args, out="alone"))
    one, two = ([m for m in read_metrics(Path(folder)) if "loss" in m] for folder in ("alone", "apart"))
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
