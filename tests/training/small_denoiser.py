"""A small real denoiser and learners over it, for tests and for the processes they spawn. Imports no diffusers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from factory.diffusion.conditions import Conditions
from factory.training.examples import Examples, Latents
from factory.training.learners import DiffusionLearner
from factory.training.loop import TrainingResult, train
from factory.training.mixture import BatchSampler
from factory.training.objectives import NoisePrediction
from factory.training.settings import TrainingSettings
from factory.training.world import World

NUM_ROWS = 11
NUM_TIMESTEPS = 50
SHAPE = (2, 4, 4)
RESOLUTION = 8


class ConvDenoiser(nn.Module):
    """Two convolutions that see latents, timestep, prompt and mask."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Conv2d(SHAPE[0] + 2, 12, 3, padding=1)
        self.out = nn.Conv2d(12, SHAPE[0], 3, padding=1)
        self.prompt = nn.Linear(6, 12)
        self.frozen = nn.Linear(3, 3)
        self.frozen.requires_grad_(False)

    def forward(
        self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, controlnet_cond: Tensor | None = None
    ) -> Tensor:
        time = (timesteps.float() / NUM_TIMESTEPS)[:, None, None, None].expand(-1, 1, *latents.shape[2:])
        mask = torch.zeros_like(time)
        if controlnet_cond is not None:
            mask = nn.functional.adaptive_avg_pool2d(controlnet_cond, latents.shape[2:])
        hidden = self.inside(torch.cat([latents, time, mask], 1))
        return self.out(torch.tanh(hidden + self.prompt(prompt_embeds.mean(1))[:, :, None, None]))


def make_denoiser(seed: int = 0) -> ConvDenoiser:
    torch.manual_seed(seed)
    return ConvDenoiser()


def make_examples(settings: TrainingSettings, num_rows: int = NUM_ROWS) -> Examples:
    rng = np.random.default_rng(5)
    arrays = [rng.normal(size=(num_rows, *SHAPE)).astype(np.float16) for _ in range(2)]
    logvars = [np.full((num_rows, *SHAPE), -6, np.float16) for _ in range(2)]
    return Examples(
        latents=Latents(mean=arrays[0], logvar=logvars[0], flipped_mean=arrays[1], flipped_logvar=logvars[1]),
        prompts=1 + np.arange(num_rows) % 2,
        masks=[(rng.random((RESOLUTION, RESOLUTION)) < 0.3).astype(np.uint8) for _ in range(num_rows)],
        num_timesteps=NUM_TIMESTEPS,
        seed=settings.seed,
        prompt_dropout=settings.prompt_dropout,
        horizontal_flip=settings.horizontal_flip,
    )


def make_settings(**changes: Any) -> TrainingSettings:
    values: dict[str, Any] = {
        "max_steps": 20, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 5, "ema_decay": 0.9,
        "horizontal_flip": True, "checkpoint_every": 4, "log_every": 3, "validate_every": 5, "sample_every": 0,
    }  # fmt: skip
    return TrainingSettings(**{**values, **changes})


def conditions(embeds: Tensor, *, masks: Tensor, **_: Any) -> Conditions:
    return Conditions(prompt_embeds=embeds, controlnet_cond=masks[:, None].float())


def make_learner(
    settings: TrainingSettings,
    world: World | None = None,
    denoiser: nn.Module | None = None,
    prediction_type: str = "epsilon",
) -> DiffusionLearner:
    examples = make_examples(settings)
    return DiffusionLearner(
        denoiser=denoiser or make_denoiser(),
        examples=examples,
        prompt_embeds=torch.from_numpy(np.random.default_rng(6).normal(size=(3, 5, 6)).astype(np.float32)),
        conditions=conditions,
        alphas_cumprod=torch.linspace(0.999, 0.01, NUM_TIMESTEPS),
        prediction_type=prediction_type,
        objectives=(NoisePrediction(),),
        settings=settings,
        world=world or World(),
        validation=examples.fixed(np.arange(5), [f"image-{i}" for i in range(5)]),
    )


def run_here(out: Path, settings: TrainingSettings, world: World | None = None) -> TrainingResult:
    """One whole run (or its continuation) in this process."""
    torch.set_num_threads(1)
    world = world or World()
    sampler = BatchSampler(num_rows=NUM_ROWS, batch_size=settings.batch_size, seed=settings.seed)
    return train(make_learner(settings, world), sampler, settings, out, world=world)


def run_rank(out: Path, settings: TrainingSettings, rank: int, size: int, port_file: Path) -> None:
    """One of `size` processes that train together over gloo."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=size)
    run_here(out, settings, World(rank=rank, size=size))
    dist.destroy_process_group()
