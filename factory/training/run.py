"""A training run from a task to a generator folder: what each process executes.

OUT/generator.json, controlnet/, unet/ or unet_lora/    the generator, averaged weights, diffusers and peft format
OUT/metrics.jsonl, samples/                             learning curve and sample grids
OUT/training.json, checkpoints/                         identity and exact state, for going on
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from factory.generators.loaded import LoadedGenerator
from factory.imaging import TrainingRow
from factory.training.examples import DiffusionBatch, Examples, Latents
from factory.training.latent_cache import (
    NULL_PROMPT,
    embed_prompts,
    encoder_of,
    fill_latents,
    latent_kl,
    latents_uri,
    prompts_uri,
    read_latents,
)
from factory.training.learners import DiffusionLearner
from factory.training.loop import TrainingResult, train
from factory.training.metrics import Observer
from factory.training.mixture import BatchSampler
from factory.training.previews import PreviewGrid, choose_rows
from factory.training.run_identity import write_identity
from factory.training.task import TrainingTask, load_rows
from factory.training.world import World
from schemas.identity import torch_seed

NUM_PREVIEWS = 6
MAX_VALIDATION_ROWS = 64


def train_generator(
    task: TrainingTask, identity: Mapping[str, Any], world: World, observer: Observer | None = None
) -> TrainingResult:
    """Train, or go on training, and leave the generator in `task.out`. Every process of the world calls this.

    Args:
        task: what to do; `check_task` and `check_identity` should have passed.
        identity: of the task, `task.identity_of`.
        world: the processes that train together.
        observer: told of metrics and previews on rank 0.

    Raises:
        ValueError: as `loop.train`.
    """
    settings, observer = task.settings, observer or Observer()
    generator = load_for_training(task, world.device)
    train_rows = load_rows(task, "train")
    held_out = choose_rows(load_rows(task, "val"), MAX_VALIDATION_ROWS)
    prompts = task.prompts.fit(train_rows)
    texts = [prompts.describe(row) for row in (*train_rows, *held_out)]
    table = list(dict.fromkeys([NULL_PROMPT, *texts]))
    place = {text: number for number, text in enumerate(table)}
    numbers = np.array([place[text] for text in texts])
    embeds = _cached_prompts(task, generator, table, world)
    latents = _cached_latents(task, generator, train_rows, world, task.flips(), observer)

    examples = _examples(task, generator, train_rows, latents, numbers[: len(train_rows)])
    validation = None
    if held_out:
        held_out_latents = _cached_latents(task, generator, held_out, world, (False,), observer)
        validation = _fixed_batch(task, generator, held_out, held_out_latents, numbers[len(train_rows) :])
    learner = _learner(task, generator, examples, validation, embeds, world)
    preview = None
    if held_out and settings.sample_every:
        shown = held_out[:NUM_PREVIEWS]
        shown_embeds = embeds[numbers[len(train_rows) : len(train_rows) + len(shown)]]
        preview = PreviewGrid(generator, shown, shown_embeds, embeds[:1], task.sampling)
    del train_rows, held_out  # decoded images are not needed any more
    if world.rank == 0:
        write_identity(task.out, identity, finished_step=None)
    result = train(
        learner,
        BatchSampler(num_rows=len(examples), batch_size=settings.batch_size, seed=settings.seed),
        settings,
        task.out,
        world=world,
        observer=observer,
        preview=preview,
        constants=latent_kl(latents, float(generator.vae.config.scaling_factor)),
    )
    if world.rank == 0:
        learner.finish()
        generator.save(task.out, _manifest(task, identity, result.steps))
        write_identity(task.out, identity, finished_step=result.steps)
    world.barrier()
    return result


def load_for_training(task: TrainingTask, device: str) -> LoadedGenerator:
    """The generator with fresh trainable parts; a resumed run overwrites them from its checkpoint."""
    seed = torch_seed(f"training/{task.settings.seed}", "init") % 2**31
    generator = task.generator.load(device=device, dtype="float32", adapt_from=task.adapt_from, seed=seed)
    if task.settings.gradient_checkpointing:
        for model in (generator.unet, generator.controlnet):
            if model is not None:
                model.enable_gradient_checkpointing()
    return generator


def _learner(
    task: TrainingTask,
    generator: LoadedGenerator,
    examples: Examples,
    validation: DiffusionBatch | None,
    embeds: Tensor,
    world: World,
) -> DiffusionLearner:
    noise_scheduler: Any = generator.noise_scheduler
    return DiffusionLearner(
        denoiser=generator.denoiser(),
        examples=examples,
        prompt_embeds=embeds,
        condition=generator.condition if task.generator.conditioning.uses_mask else None,
        alphas_cumprod=noise_scheduler.alphas_cumprod,
        prediction_type=noise_scheduler.config.prediction_type,
        objectives=task.objectives,
        settings=task.settings,
        world=world,
        validation=validation,
    )


def _cached_prompts(
    task: TrainingTask, generator: LoadedGenerator, table: Sequence[str], world: World
) -> Tensor:
    """Embeddings (P, L, D) float32 of the prompt table; rank 0 adds what the cache lacks."""

    def embed(prompts: list[str]) -> np.ndarray:
        return generator.encode_prompts(prompts).float().cpu().numpy()

    uri = prompts_uri(task.real, task.generator)
    if world.rank == 0:
        embed_prompts(uri, table, embed)
    world.barrier()
    return torch.from_numpy(embed_prompts(uri, table, embed))


def _cached_latents(
    task: TrainingTask,
    generator: LoadedGenerator,
    rows: Sequence[TrainingRow],
    world: World,
    flips: Sequence[bool],
    observer: Observer,
) -> Latents:
    """Posteriors of `rows`; rank 0 encodes what the cache lacks."""
    uri = latents_uri(task.real, task.generator)
    if world.rank == 0:
        fill_latents(uri, rows, encoder_of(generator), flips=flips, progress=observer.on_latents)
    world.barrier()
    return read_latents(uri, [row.image_id for row in rows], horizontal_flip=True in flips)


def _examples(
    task: TrainingTask,
    generator: LoadedGenerator,
    rows: Sequence[TrainingRow],
    latents: Latents,
    prompts: np.ndarray,
) -> Examples:
    noise_scheduler: Any = generator.noise_scheduler
    uses_mask = task.generator.conditioning.uses_mask
    return Examples(
        latents=latents,
        prompts=prompts,
        masks=[row.mask for row in rows if row.mask is not None] if uses_mask else None,
        num_timesteps=len(noise_scheduler.alphas_cumprod),
        seed=task.settings.seed,
        prompt_dropout=task.settings.prompt_dropout,
        horizontal_flip=latents.flipped_mean is not None,
    )


def _fixed_batch(
    task: TrainingTask,
    generator: LoadedGenerator,
    rows: Sequence[TrainingRow],
    latents: Latents,
    prompts: np.ndarray,
) -> DiffusionBatch:
    names = [row.image_id for row in rows]
    return _examples(task, generator, rows, latents, prompts).fixed(np.arange(len(rows)), names)


def _manifest(task: TrainingTask, identity: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """What `generator.json` records of the training."""
    from factory.storage import class_names, open_table

    table = open_table(task.real, version=task.real_version)
    return {
        "name": task.recipe,
        "real": identity["real"],
        "labels": list(class_names(table)),
        "steps": steps,
        "training": identity["training"],
        "objectives": identity["objectives"],
        "prompts": identity["prompts"],
    }
