"""SketchPerception: a branch on the real UNet's encoder that changes nothing where it is taken away."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from factory.assets.base_models import TINY_UNET
from factory.generators.loaded import Denoiser
from factory.imaging import TrainingRow
from factory.sketches import Canny, DifferenceOfGaussians
from factory.training.objectives import PredictionStep, TrainingContext
from factory.training.sketch_branch import SketchBranch, balanced_mean
from factory.training.sketch_cache import sketches_of, sketches_uri
from factory.training.sketch_perception import SketchPerception

ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)


def make_unet(widths: Sequence[int]) -> UNet2DConditionModel:
    torch.manual_seed(0)
    down = ["CrossAttnDownBlock2D"] * (len(widths) - 1) + ["DownBlock2D"]
    up = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (len(widths) - 1)
    return UNet2DConditionModel(
        **{
            **TINY_UNET,
            "block_out_channels": list(widths),
            "down_block_types": down,
            "up_block_types": up,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
        }
    )


def bind(unet: UNet2DConditionModel, side: int, resolution: int, **fields: Any) -> SketchBranch:
    context = TrainingContext(
        generator=SimpleNamespace(unet=unet, latent_shape=(unet.config.in_channels, side, side)),
        prompts=("",),
        resolution=resolution,
        seed=1,
    )
    return SketchPerception(**{"channels": 16, **fields}).bind(context)  # type: ignore[return-value]


def step(sketches: torch.Tensor, timesteps: Sequence[int]) -> PredictionStep:
    zeros = torch.zeros(len(timesteps), 1, 2, 2)
    return PredictionStep(
        latents=zeros,
        noise=zeros,
        timesteps=torch.tensor(timesteps),
        alphas_cumprod=ALPHAS,
        prediction_type="epsilon",
        model_pred=zeros,
        timestep_weights=torch.ones(len(timesteps)),
        extras={"sketches": sketches},
    )


def run(unet: UNet2DConditionModel, branch: SketchBranch | None, side: int, batch: int = 2) -> Any:
    rng = torch.Generator().manual_seed(4)
    latents = torch.randn((batch, unet.config.in_channels, side, side), generator=rng)
    embeds = torch.randn((batch, 5, unet.config.cross_attention_dim), generator=rng)
    denoiser = Denoiser(unet, None)
    if branch is None:
        return denoiser(latents, torch.full((batch,), 300), embeds), None
    with branch.capture(denoiser):
        pred = denoiser(latents, torch.full((batch,), 300), embeds)
    return pred, branch()


def test_features_are_those_of_the_four_encoder_resolutions_before_each_halving() -> None:
    """The Stable Diffusion shape, narrow: 32², 16², 8², 4² of 256 px images, sketch of 256 px."""
    unet = make_unet((8, 16, 24, 24))
    branch = bind(unet, 32, 256)
    denoiser = Denoiser(unet, None)
    with branch.capture(denoiser), torch.no_grad():
        denoiser(torch.randn(1, unet.config.in_channels, 32, 32), torch.tensor([5]), torch.randn(1, 4, 64))
    shapes = [tuple(f.shape[1:]) for f in branch._features]
    assert shapes == [(8, 32, 32), (16, 16, 16), (24, 8, 8), (24, 4, 4)]
    assert branch().shape == (1, 256, 256)


def test_taking_the_branch_away_leaves_the_prediction_bit_equal() -> None:
    unet = make_unet((16, 32))
    with_branch, sketch = run(unet, bind(unet, 8, 64), 8)
    without, _ = run(unet, None, 8)
    assert torch.equal(with_branch, without) and sketch.shape == (2, 64, 64)
    assert all(not block._forward_hooks for block in unet.down_blocks)


def test_the_branch_trains_the_encoder_and_not_the_decoder_of_the_unet() -> None:
    unet = make_unet((16, 32))
    branch = bind(unet, 8, 64)
    _, sketch = run(unet, branch, 8)
    branch.loss(step(torch.full((2, 64, 64), 255, dtype=torch.uint8), [0, 1]), sketch).sum().backward()
    assert unet.conv_in.weight.grad is not None and unet.conv_in.weight.grad.abs().sum() > 0
    assert unet.down_blocks[1].resnets[0].conv1.weight.grad is not None
    assert unet.conv_out.weight.grad is None
    assert all(p.grad is not None for p in branch.parameters())


def test_the_loss_fades_with_the_square_root_of_alpha_bar() -> None:
    branch = bind(make_unet((16, 32)), 8, 64)
    sketches = (torch.rand(1, 64, 64) < 0.1).to(torch.uint8).expand(3, -1, -1) * 255
    loss = branch.loss(step(sketches, [0, 500, 999]), torch.zeros(3, 64, 64))
    assert (loss[2] / loss[0]).item() == pytest.approx(0.0683, abs=2e-4)
    assert (loss[1] / loss[0]).item() == pytest.approx(0.526, abs=2e-3)
    printed = bind(make_unet((16, 32)), 8, 64, timestep_weight="paper")
    loss = printed.loss(step(sketches, [0, 500, 999]), torch.zeros(3, 64, 64))
    assert 0.993 < (loss[2] / loss[0]).item() < 1.0


@pytest.mark.parametrize("kind", ["balanced", "paper"])
def test_the_constant_zero_is_the_measure(kind: Any) -> None:
    """Sparse edges: zero is best among constants for plain L1, and no better than any other for the balanced one."""
    branch = bind(make_unet((16, 32)), 8, 64, loss=kind)
    edges = (torch.rand((2, 64, 64), generator=torch.Generator().manual_seed(0)) < 0.08).float()
    sketches = (edges * 255).to(torch.uint8)
    for level in (0.2, 0.7):
        logits = torch.full((2, 64, 64), level).logit()
        found = branch.metrics(step(sketches, [0, 1]), logits)
        if kind == "paper":
            assert (found["sketch_error_of_zero"] < found["sketch_error"]).all()
            torch.testing.assert_close(found["sketch_error_of_zero"], edges.mean((1, 2)))
        else:
            torch.testing.assert_close(found["sketch_error"], found["sketch_error_of_zero"])
            torch.testing.assert_close(found["sketch_error_of_zero"], torch.full((2,), 0.5))
    perfect = branch.metrics(step(sketches, [0, 1]), (edges * 2 - 1) * 20)["sketch_error"]
    assert (perfect < 1e-4).all()


def test_balanced_mean_gives_both_sides_half() -> None:
    edges = torch.zeros(1, 10, 10)
    edges[0, 0, :5] = 1
    assert balanced_mean(edges * 3, edges > 0).item() == pytest.approx(1.5)
    assert balanced_mean(1 - edges, edges > 0).item() == pytest.approx(0.5)
    assert balanced_mean(torch.ones(1, 10, 10), torch.zeros(1, 10, 10) > 0).item() == pytest.approx(0.5)


def test_weights_come_from_the_seed() -> None:
    unet = make_unet((16, 32))
    one, two = bind(unet, 8, 64), bind(unet, 8, 64)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="power of two"):
        bind(make_unet((16, 32)), 8, 96)
    with pytest.raises(ValueError, match="no sketches"):
        branch = bind(make_unet((16, 32)), 8, 64)
        branch.loss(
            PredictionStep(**{**vars(step(torch.zeros(1, 64, 64), [0])), "extras": {}}),
            torch.zeros(1, 64, 64),
        )
    for fields in ({"weight": -1.0}, {"loss": "l2"}, {"timestep_weight": "t"}, {"channels": 12}):
        with pytest.raises(ValueError, match="SketchPerception"):
            SketchPerception(**fields)  # type: ignore[arg-type]
    assert SketchPerception().needs == ("sketches",)


def rows(count: int) -> list[TrainingRow]:
    rng = np.random.default_rng(0)
    return [
        TrainingRow(
            image_id=f"{k:032x}",
            label=0,
            label_name="benign",
            group_id=str(k),
            image=rng.integers(0, 255, (32, 32, 3)[: 2 + k % 2], dtype=np.uint8),
            mask=None,
            attributes={},
        )
        for k in range(count)
    ]


def test_sketches_are_drawn_once_and_kept_beside_the_table(tmp_path: Any) -> None:
    from factory.storage import open_table

    real, extractor, drawn = str(tmp_path / "real.lance"), DifferenceOfGaussians(sigma=0.03), []
    first = sketches_of(real, extractor, rows(3), lambda done, total: drawn.append((done, total)))
    again = sketches_of(real, extractor, rows(5)[::-1], lambda done, total: drawn.append((done, total)))
    assert drawn == [(3, 3), (2, 2)]
    for row, sketch in zip([*rows(3), *rows(5)[::-1]], [*first, *again], strict=True):
        assert np.array_equal(sketch, extractor.draw(row.image))
    assert open_table(sketches_uri(real, extractor, 32)).count() == 5
    other = sketches_of(real, Canny(), rows(1))
    assert np.array_equal(other[0], Canny().draw(rows(1)[0].image))
    assert sketches_of(real, extractor, []) == []
