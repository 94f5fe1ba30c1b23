"""A training run from a task to a generator folder: what each process executes.

OUT/generator.json, controlnet/, unet/ or unet_lora/    the generator, averaged weights, diffusers and peft format
OUT/metrics.jsonl, samples/                             learning curve and sample grids
OUT/training.json, checkpoints/                         identity and exact state, for going on
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from factory.generators.loaded import LoadedGenerator
from factory.imaging import TrainingRow
from factory.training.examples import DiffusionBatch, Examples
from factory.training.latent_cache import (
    NULL_PROMPT,
    embed_prompts,
    encoder_of,
    fill_latents,
    latent_kl,
    latents_uri,
    prompts_uri,
    read_latents,
    variants_of,
)
from factory.training.learners import DiffusionLearner
from factory.training.loop import TrainingResult, train
from factory.training.metrics import Observer
from factory.training.mixture import BatchSampler
from factory.training.objectives import TrainingContext
from factory.training.previews import PreviewGrid
from factory.training.run_identity import write_identity
from factory.training.task import (
    FittedPrompts,
    TrainingTask,
    choose_rows,
    load_rows,
    training_rows,
    usable_rows,
)
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
    all_rows = load_rows(task, "train")
    rows = training_rows(task, all_rows)
    held_out = choose_rows(usable_rows(task, load_rows(task, "val")), MAX_VALIDATION_ROWS)
    data = _load_data(task, generator, task.prompts.fit(all_rows), rows, held_out, world, observer)
    learner = _learner(task, generator, data, world)
    preview = None
    if held_out and settings.sample_every:
        preview = _preview(task, generator, data, held_out[:NUM_PREVIEWS])
    del all_rows, rows, held_out  # decoded images are not needed any more
    if world.rank == 0:
        write_identity(task.out, identity, finished_step=None)
    result = train(
        learner,
        BatchSampler(num_rows=len(data.examples), batch_size=settings.batch_size, seed=settings.seed),
        settings,
        task.out,
        world=world,
        observer=observer,
        preview=preview,
        constants=latent_kl(data.examples.latents, float(generator.vae.config.scaling_factor)),
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


@dataclass(frozen=True, kw_only=True, eq=False)
class _Data:
    """What training reads: encoded rows, fixed held-out inputs, the prompt table (P) and its embeddings (P, L, D)."""

    examples: Examples
    validation: DiffusionBatch | None
    prompts: tuple[str, ...]
    embeds: Tensor


def _load_data(
    task: TrainingTask,
    generator: LoadedGenerator,
    prompts: FittedPrompts,
    rows: Sequence[TrainingRow],
    held_out: Sequence[TrainingRow],
    world: World,
    observer: Observer,
) -> _Data:
    texts = [prompts.describe(row) for row in (*rows, *held_out)]
    table = tuple(dict.fromkeys([NULL_PROMPT, *texts]))
    place = {text: number for number, text in enumerate(table)}
    numbers = np.array([place[text] for text in texts])
    flips = (False, True) if task.settings.horizontal_flip else (False,)
    examples = _examples(task, generator, rows, numbers[: len(rows)], flips, world, observer)
    validation = None
    if held_out:
        names = [row.image_id for row in held_out]
        others = _examples(task, generator, held_out, numbers[len(rows) :], (False,), world, observer)
        validation = others.fixed(np.arange(len(held_out)), names)
    embeds = _cached_prompts(task, generator, table, world)
    return _Data(examples=examples, validation=validation, prompts=table, embeds=embeds)


def _learner(task: TrainingTask, generator: LoadedGenerator, data: _Data, world: World) -> DiffusionLearner:
    noise_scheduler: Any = generator.noise_scheduler
    return DiffusionLearner(
        denoiser=generator.denoiser(),
        examples=data.examples,
        prompt_embeds=data.embeds,
        conditions=generator.conditions,
        alphas_cumprod=noise_scheduler.alphas_cumprod,
        prediction_type=noise_scheduler.config.prediction_type,
        objectives=task.objectives,
        context=TrainingContext(
            generator=generator,
            prompts=data.prompts,
            resolution=generator.resolution,
            seed=torch_seed(f"training/{task.settings.seed}", "objectives") % 2**31,
        ),
        settings=task.settings,
        world=world,
        validation=data.validation,
    )


def _preview(
    task: TrainingTask, generator: LoadedGenerator, data: _Data, rows: Sequence[TrainingRow]
) -> PreviewGrid:
    assert data.validation is not None
    fixed = data.validation.slice(0, len(rows)).to(str(generator.device))
    embeds = data.embeds.to(generator.device, generator.dtype)
    conditions = generator.conditions(
        embeds[fixed.prompts], masks=fixed.masks, labels=fixed.labels, masked_latents=fixed.masked_latents
    )
    return PreviewGrid(generator, rows, conditions, embeds[:1], task.sampling)


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


def _examples(
    task: TrainingTask,
    generator: LoadedGenerator,
    rows: Sequence[TrainingRow],
    prompts: np.ndarray,
    flips: Sequence[bool],
    world: World,
    observer: Observer,
) -> Examples:
    """The rows encoded; rank 0 computes what the caches lack."""
    uri = latents_uri(task.real, task.generator)
    variants = variants_of(task, flips)
    if world.rank == 0:
        fill_latents(uri, rows, encoder_of(generator), variants=variants, progress=observer.on_latents)
    world.barrier()
    extras = {}
    for objective in task.objectives:
        if "sketches" in objective.needs:
            extras["sketches"] = _cached_sketches(task, objective, rows, world)
    noise_scheduler: Any = generator.noise_scheduler
    return Examples(
        latents=read_latents(uri, rows, variants),
        prompts=prompts,
        masks=[row.mask for row in rows if row.mask is not None] if "masks" in task.needs else None,
        labels=np.array([row.label for row in rows]),
        extras=extras,
        num_timesteps=len(noise_scheduler.alphas_cumprod),
        seed=task.settings.seed,
        prompt_dropout=task.settings.prompt_dropout,
        horizontal_flip=True in flips,
    )


def _cached_sketches(
    task: TrainingTask, objective: Any, rows: Sequence[TrainingRow], world: World
) -> list[np.ndarray]:
    """Sketches uint8 (R, R) of the rows; rank 0 draws what the cache lacks."""
    from factory.training.sketch_cache import sketches_of

    if world.rank == 0:
        sketches_of(task.real, objective.extractor, rows)
    world.barrier()
    return sketches_of(task.real, objective.extractor, rows)


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
