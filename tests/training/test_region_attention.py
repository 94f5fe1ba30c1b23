"""`RegionAttention`: the loss by hand, in a real learner, and what it refuses."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from factory.training.objectives import NoisePrediction, PredictionStep, TrainingContext
from factory.training.region_attention import RegionAttention

TOKENS = (("lesion", "inside"), ("skin", "outside"))
PROMPTS = ("", "image of lesion in skin", "image of lesion", "skin tissue")


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from factory.assets.base_models import write_random_base
    from factory.generators.conditioning import TextOnly
    from factory.generators.latent_diffusion import LatentDiffusion, Trainable

    torch.set_num_threads(1)
    base = write_random_base(tmp_path_factory.mktemp("base") / "micro", "micro")
    return LatentDiffusion(
        base=str(base), conditioning=TextOnly(), trainable=Trainable(unet="full"), resolution=64
    ).load()


def bind(generator: Any, **changes: Any) -> Any:
    context = TrainingContext(generator=generator, prompts=PROMPTS, resolution=64, seed=0)
    return RegionAttention(**{"side": 4, "tokens": TOKENS} | changes).bind(context)


def step_of(masks: torch.Tensor, prompts: list[int]) -> PredictionStep:
    latents = torch.zeros(len(prompts), 4, 8, 8)
    return PredictionStep(
        latents=latents, noise=latents, timesteps=torch.zeros(len(prompts), dtype=torch.int64),
        alphas_cumprod=torch.ones(1), prediction_type="epsilon", model_pred=latents,
        timestep_weights=torch.ones(len(prompts)), masks=masks, prompts=torch.tensor(prompts),
    )  # fmt: skip


def half_mask(count: int) -> torch.Tensor:
    masks = torch.zeros((count, 64, 64), dtype=torch.uint8)
    masks[:, :, :40] = 1  # two and a half columns of four cells
    return masks


def test_normalised_form_by_hand(generator: Any) -> None:
    bound = bind(generator)
    places = [generator.token_positions([PROMPTS[1]], word)[0][0] for word in ("lesion", "skin")]
    length = generator.num_prompt_tokens
    attention = torch.rand((1, 16, length), generator=torch.Generator().manual_seed(0))
    target = np.tile([1.0, 1.0, 0.5, 0.0], (4, 1)).ravel()
    expected = 0.0
    for place, region in zip(places, (target, 1 - target), strict=True):
        values = attention[0, :, place].numpy()
        values = (values - values.min()) / (values.max() - values.min())
        expected += float(((values - region) ** 2).mean()) / 2
    loss = bound.loss(step_of(half_mask(1), [1]), attention)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_paper_form_is_half_the_sum_of_squares_of_raw_attention(generator: Any) -> None:
    bound = bind(generator, form="paper")
    places = [generator.token_positions([PROMPTS[1]], word)[0][0] for word in ("lesion", "skin")]
    attention = torch.rand((1, 16, generator.num_prompt_tokens), generator=torch.Generator().manual_seed(0))
    target = torch.tensor([1.0, 1.0, 0.5, 0.0]).repeat(4)
    squares = [
        (attention[0, :, place] - region).square().sum()
        for place, region in zip(places, (target, 1 - target), strict=True)
    ]
    loss = bound.loss(step_of(half_mask(1), [1]), attention)
    assert loss.item() == pytest.approx(0.5 * float(sum(squares)), rel=1e-5)


def test_the_right_map_scores_zero_and_the_opposite_one(generator: Any) -> None:
    bound = bind(generator)
    masks = torch.zeros((1, 64, 64), dtype=torch.uint8)
    masks[:, 16:48, 16:48] = 1
    inside = torch.zeros(4, 4)
    inside[1:3, 1:3] = 1
    lesion, skin = (generator.token_positions([PROMPTS[1]], word)[0][0] for word in ("lesion", "skin"))
    attention = torch.zeros((1, 16, generator.num_prompt_tokens))
    attention[0, :, lesion] = 0.1 + 0.2 * inside.flatten()
    attention[0, :, skin] = 0.3 - 0.2 * inside.flatten()
    step = step_of(masks, [1])
    assert bound.loss(step, attention).item() == pytest.approx(0.0, abs=1e-6)
    attention[0, :, [lesion, skin]] = attention[0, :, [skin, lesion]]
    assert bound.loss(step, attention).item() == pytest.approx(1.0, abs=1e-6)


def test_absent_words_null_prompts_and_empty_masks_contribute_nothing(generator: Any) -> None:
    bound, paper = bind(generator), bind(generator, form="paper")
    attention = torch.rand((1, 16, generator.num_prompt_tokens), generator=torch.Generator().manual_seed(0))
    both, one, null = (bound.loss(step_of(half_mask(1), [row]), attention).item() for row in (1, 2, 0))
    assert null == 0.0
    assert one > 0.0 and both > 0.0
    empty = step_of(torch.zeros((1, 64, 64), dtype=torch.uint8), [1])
    assert bound.loss(empty, attention).item() == 0.0
    assert paper.loss(empty, attention).item() > 0.0


def learner_of(generator: Any, objectives: tuple[Any, ...], seed: int = 0) -> Any:
    from factory.training.examples import Examples, Latents
    from factory.training.learners import DiffusionLearner
    from factory.training.settings import TrainingSettings
    from factory.training.world import World

    rng = np.random.default_rng(seed)
    mean = rng.normal(size=(4, *generator.latent_shape)).astype(np.float16)
    settings = TrainingSettings(
        max_steps=50, batch_size=4, learning_rate=3e-3, warmup_steps=1, prompt_dropout=0.0
    )
    scheduler = generator.noise_scheduler
    return DiffusionLearner(
        denoiser=generator.denoiser(),
        examples=Examples(
            latents=Latents(mean=mean, logvar=np.full_like(mean, -10)),
            prompts=np.ones(4, np.int64),
            masks=list(half_mask(4).numpy()),
            num_timesteps=len(scheduler.alphas_cumprod),
        ),
        prompt_embeds=generator.encode_prompts(PROMPTS).clone(),
        conditions=generator.conditions,
        alphas_cumprod=scheduler.alphas_cumprod,
        prediction_type="epsilon",
        objectives=objectives,
        context=TrainingContext(generator=generator, prompts=PROMPTS, resolution=64, seed=0),
        settings=settings,
        world=World(),
    )


def test_training_lowers_it_and_leaves_no_processor_behind(generator: Any) -> None:
    from factory.training.mixture import BatchSampler, global_batch

    before = {name: type(module.processor) for name, module in generator.unet.named_modules() if hasattr(module, "processor")}  # fmt: skip
    learner = learner_of(generator, (NoisePrediction(), RegionAttention(weight=1.0, side=4, tokens=TOKENS)))
    sampler = BatchSampler(num_rows=4, batch_size=4, seed=0)
    values = []
    for step in range(12):
        metrics = learner.step(learner.draw(global_batch(sampler, step)))
        values.append(float(metrics["RegionAttention"]))
        assert math.isclose(
            float(metrics["loss"]),
            float(metrics["NoisePrediction"] + metrics["RegionAttention"]),
            rel_tol=1e-5,
        )
    assert np.mean(values[-3:]) < 0.8 * np.mean(values[:3]), values
    after = {name: type(module.processor) for name, module in generator.unet.named_modules() if hasattr(module, "processor")}  # fmt: skip
    assert before == after
    assert not any("RegionAttention" in name for name in learner.tensors()["trainable"])


def test_what_cannot_work_is_refused(generator: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sides 8, 4"):
        bind(generator, side=16)
    with pytest.raises(ValueError, match="none of the 4 training prompts has '<lesion>'"):
        bind(generator, tokens=(("<lesion>", "inside"),))
    checkpointing = SimpleNamespace(
        unet=SimpleNamespace(is_gradient_checkpointing=True), latent_shape=generator.latent_shape
    )
    with pytest.raises(ValueError, match="gradient_checkpointing"):
        RegionAttention(side=4).bind(
            TrainingContext(generator=checkpointing, prompts=PROMPTS, resolution=64, seed=0)
        )
    for changes, name in (({"weight": 0.0}, "weight"), ({"form": "l1"}, "form"), ({"tokens": ()}, "tokens")):
        with pytest.raises(ValueError, match=name):
            RegionAttention(**changes)  # type: ignore[arg-type]
