"""Training what a recipe needs beside its generator: the VAE, the mask GAN, the mask DDPM, a segmenter to judge images.

They leave in their folder, beside the learning curve and the exact state:

    vae             vae/ (diffusers AutoencoderKL) and vae.json; used by `--generator.vae OUT`
    mask_gan        model.safetensors and mask_model.json; used by `--masks.checkpoint OUT`
    mask_diffusion  the same
    segmenter       tensors.safetensors, fitted.json and segmenter.json; used by `--segmenter OUT`

The first three run in the generator's loop, the segmenter in that of the predictors. `check_run` and its neighbours take any task, a generator's too. No torch until a run begins.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from factory.generators.checkpoints import MANIFEST, digest_part
from factory.generators.latent_diffusion import LatentDiffusion
from factory.generators.mask_checkpoints import MASK_MANIFEST, WEIGHTS
from factory.generators.mask_diffusion import DIFFUSION_KIND, MaskDDPM
from factory.generators.mask_gan import GAN_KIND, MaskGAN
from factory.generators.mask_training import MaskModelTraining
from factory.predictors.segmenter_folder import SEGMENTER_MANIFEST, SEGMENTER_TENSORS
from factory.training.part_learners import lesion_classes, make_learner, part_rows
from factory.training.run_identity import clear_run, read_identity, write_identity, write_json
from factory.training.segmenter_stage import FOLDS_FOLDER, SegmenterStage
from factory.training.settings import TrainingSettings
from factory.training.task import (
    ROW_COLUMNS,
    TrainingTask,
    check_task,
    choose_rows,
    finished_step,
    identity_of,
)
from factory.training.vae_stage import VAEStage
from schemas.identity import canonical

if TYPE_CHECKING:
    from factory.training.loop import TrainingResult
    from factory.training.metrics import Observer
    from factory.training.world import World

Part = Literal["generator", "vae", "mask_gan", "mask_diffusion", "segmenter"]
PARTS: tuple[str, ...] = get_args(Part)
VAE_MANIFEST = "vae.json"
MANIFESTS = {
    "vae": VAE_MANIFEST,
    "mask_gan": MASK_MANIFEST,
    "mask_diffusion": MASK_MANIFEST,
    "segmenter": SEGMENTER_MANIFEST,
}
"""The file that says that a part's run is finished."""
NUM_PREVIEWS = 8
MAX_HELD_OUT = 64


@dataclass(frozen=True, kw_only=True)
class PartTask:
    """What training one part is asked to do; picklable.

    Attributes:
        part: which.
        recipe: name, recorded with the weights.
        component: what is trained, with its settings.
        generator: whose VAE is trained, at whose resolution; only read by the parts "vae" and "segmenter".
        real, real_version: the real table and the version of it that is read.
        out: the run's folder, absolute.
    """

    part: Part
    recipe: str
    component: VAEStage | MaskGAN | MaskDDPM | SegmenterStage
    generator: LatentDiffusion
    real: str
    real_version: int
    out: Path

    @property
    def settings(self) -> TrainingSettings:
        """Optimisation."""
        if isinstance(self.component, SegmenterStage):
            return _settings_of_fits(self.component)
        training = self.component.training
        return training if isinstance(training, TrainingSettings) else as_settings(training)

    @property
    def resolution(self) -> int:
        """Side of what is trained on, px."""
        if isinstance(self.component, VAEStage):
            return self.generator.resolution
        if isinstance(self.component, SegmenterStage):
            return self.component.size or self.generator.resolution
        return self.component.resolution

    @property
    def manifest(self) -> Path:
        """The file that says the run is finished."""
        return self.out / MANIFESTS[self.part]


def as_settings(training: MaskModelTraining) -> TrainingSettings:
    values = {item.name: getattr(training, item.name) for item in fields(training)}
    return TrainingSettings(**values, weight_decay=0.0, prompt_dropout=0.0, mixed_precision="no")


def _settings_of_fits(stage: SegmenterStage) -> TrainingSettings:
    """What the job tells of the optimisation; the segmenter trains by its own `FitSettings`."""
    return TrainingSettings(
        max_steps=stage.total_steps,
        batch_size=stage.fit.batch_size,
        learning_rate=stage.fit.learning_rate,
        warmup_steps=stage.fit.warmup_steps,
        weight_decay=stage.fit.weight_decay,
        seed=stage.seed,
    )


# ------------------------------------------------------------------------------------------ before the run


def check_run(task: TrainingTask | PartTask, num_workers: int) -> None:
    """Everything that can be known to fail, before any model is loaded.

    Raises:
        ValueError, FileNotFoundError, PermissionError: naming the field, table or folder and what to do.
    """
    if isinstance(task, TrainingTask):
        check_task(task, num_workers)
        return
    if task.part == "mask_gan" and num_workers > 0:
        raise ValueError(
            f"--num-workers {num_workers}: the mask GAN trains in one process, since its curvature loss looks at the "
            "whole batch; leave --num-workers out (one GPU is ample for it)"
        )
    if task.part == "segmenter" and num_workers > 0:
        raise ValueError(
            f"--num-workers {num_workers}: the segmenter trains in one process; leave --num-workers out (one GPU is ample "
            "for it)"
        )
    task.settings.check_world_size(num_workers)
    _check_table(task)
    if task.part == "vae":
        _check_vae(task)
    _check_out(task.out)


def _check_vae(task: PartTask) -> None:
    import json

    folder = task.generator.base_folder()
    digest_part(folder, "vae")
    levels = len(json.loads((folder / "vae" / "config.json").read_text())["block_out_channels"])
    if task.resolution % 2 ** (levels - 1):
        raise ValueError(
            f"generator.resolution: {task.resolution} px, but the VAE of {task.generator.base} needs a multiple of "
            f"{2 ** (levels - 1)}"
        )


def _check_table(task: PartTask) -> None:
    from factory.storage import open_table

    table = open_table(task.real, version=task.real_version)
    missing = [name for name in (*ROW_COLUMNS, "split") if name not in table.schema.names]
    if missing:
        raise ValueError(
            f"--real {task.real}: no column {', '.join(missing)}; `factory prepare` makes such tables"
        )
    if not table.count("split = 'train'"):
        raise ValueError(
            f"--real {task.real}: no row in split 'train'; prepare it with a training share above 0"
        )
    if task.part != "vae" and not table.count("split = 'train' AND mask IS NOT NULL"):
        raise ValueError(
            f"--real {task.real}: no training row has a mask, so there is nothing for --part {task.part} to learn; use a "
            "dataset with masks, or a recipe that takes none (`factory recipes`)"
        )


def _check_out(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: cannot make this folder ({error.strerror})") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise PermissionError(f"--out {out}: not writable")
    foreign = sorted(path.name for path in out.iterdir() if path.name != ".ray")
    if foreign and not (out / "training.json").exists():
        raise ValueError(f"--out {out}: holds other files ({foreign[0]}, …); choose an empty or a new folder")


def identity_of_run(task: TrainingTask | PartTask) -> dict[str, Any]:
    """What fixes the trained weights, as plain data. `max_steps` is left out: asking for more goes on."""
    if isinstance(task, TrainingTask):
        return identity_of(task)
    from factory.storage import open_table, real_digest

    if isinstance(task.component, SegmenterStage):
        table = open_table(task.real, version=task.real_version)
        return {
            "part": task.part,
            "recipe": task.recipe,
            "component": canonical(task.component),
            "resolution": task.resolution,
            "real": real_digest(table),
            "validation": real_digest(table, ("val",)),
        }
    training = canonical(task.component.training)
    del training["max_steps"]
    component = {name: value for name, value in canonical(task.component).items() if name != "training"}
    identity = {
        "part": task.part,
        "recipe": task.recipe,
        "component": component,
        "training": training,
        "resolution": task.resolution,
        "real": real_digest(open_table(task.real, version=task.real_version)),
    }
    if task.part == "vae":
        identity["vae"] = digest_part(task.generator.base_folder(), "vae")
    return identity


def finished_step_of(task: TrainingTask | PartTask) -> int | None:
    """Up to which step the run in `task.out` is finished and saved; None where it is not."""
    if isinstance(task, TrainingTask):
        return finished_step(task)
    record = read_identity(task.out)
    return None if record is None or not task.manifest.is_file() else record.get("finished_step")


def clear_any_run(out: Path) -> None:
    """Delete what a run of any part wrote below `out`, and nothing else; nothing where no run is recorded there."""
    if not (out / "training.json").exists() and not (out / MANIFEST).exists():
        return
    clear_run(out)
    for name in ("vae", FOLDS_FOLDER):
        if (out / name).is_dir():
            shutil.rmtree(out / name)
    for name in (*MANIFESTS.values(), WEIGHTS, SEGMENTER_TENSORS, "fitted.json"):
        (out / name).unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------ the run


def train_run(
    task: TrainingTask | PartTask,
    identity: Mapping[str, Any],
    world: "World",
    observer: "Observer | None" = None,
) -> "TrainingResult":
    """Train, or go on training, and leave the weights in `task.out`. Every process of the world calls this.

    Raises:
        ValueError: as `loop.train`, or the training rows hold no lesion.
    """
    if isinstance(task, TrainingTask):
        from factory.training.run import train_generator

        return train_generator(task, identity, world, observer)
    if isinstance(task.component, SegmenterStage):
        return _train_segmenter(task, task.component, identity, world, observer)
    from factory.training.loop import train
    from factory.training.mixture import BatchSampler

    settings = task.settings
    rows, held_out = part_rows(task, "train"), choose_rows(part_rows(task, "val"), MAX_HELD_OUT)
    if settings.max_rows is not None:
        rows = sorted(choose_rows(rows, settings.max_rows), key=lambda row: row.image_id)
    classes = lesion_classes(task, rows)
    learner, num_rows, num_held_out = make_learner(task, rows, held_out, classes, world)
    if world.rank == 0:
        write_identity(task.out, identity, finished_step=None)
    result = train(
        learner,
        BatchSampler(num_rows=num_rows, batch_size=settings.batch_size, seed=settings.seed),
        settings,
        task.out,
        world=world,
        observer=observer,
        preview=(lambda path: _write_pairs(path, *learner.previews(NUM_PREVIEWS))) if num_held_out else None,
    )
    if world.rank == 0:
        learner.finish()
        _save(task, learner, identity, classes, result.steps)
        write_identity(task.out, identity, finished_step=result.steps)
    world.barrier()
    return result


def _train_segmenter(
    task: PartTask,
    stage: SegmenterStage,
    identity: Mapping[str, Any],
    world: "World",
    observer: "Observer | None",
) -> "TrainingResult":
    from factory.storage import class_names, open_table
    from factory.training.segmenter_run import examples_of, train_segmenter

    rows, held_out = part_rows(task, "train"), part_rows(task, "val")
    names = class_names(open_table(task.real, version=task.real_version))
    channels = 3 if 2 * sum(row.image.ndim == 3 for row in rows) > len(rows) else 1
    write_identity(task.out, identity, finished_step=None)
    result = train_segmenter(
        stage,
        examples_of(rows, names, channels),
        examples_of(held_out, names, channels) if held_out else None,
        task.out,
        real=identity["real"],
        device=world.device,
        observer=observer,
    )
    write_identity(task.out, identity, finished_step=result.steps)
    return result


def _save(
    task: PartTask, learner: Any, identity: Mapping[str, Any], classes: tuple[str, ...], steps: int
) -> None:
    """Averaged weights and a manifest that appears last."""
    record = {
        "recipe": task.recipe,
        "steps": steps,
        "training": identity["training"],
        "real": identity["real"],
    }
    if task.part == "vae":
        partial = task.out / "vae.partial"
        learner.vae.save_pretrained(partial, safe_serialization=True)
        if (task.out / "vae").exists():
            shutil.rmtree(task.out / "vae")
        partial.rename(task.out / "vae")
        record |= {"component": identity["component"], "built_on": {"vae": identity["vae"]}}
        write_json(task.manifest, record)
    else:
        save_mask_model(task.out, task.component, learner.network, classes, record)


def save_mask_model(
    out: Path, model: Any, network: Any, classes: Sequence[str], record: Mapping[str, Any]
) -> None:
    """A mask model's folder, as its source reads it: weights, written whole or not at all, then the manifest.

    Args:
        out: the folder.
        model: `MaskGAN` or `MaskDDPM`.
        network: the trained module that draws masks.
        classes: names of the classes with lesions, in the order of the network's class numbers.
        record: what else the manifest says.
    """
    from safetensors.torch import save_file

    partial = out / f"{WEIGHTS}.partial"
    tensors = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    save_file(tensors, partial)
    partial.replace(out / WEIGHTS)
    kind = GAN_KIND if isinstance(model, MaskGAN) else DIFFUSION_KIND
    manifest = {**record, "kind": kind, "model": canonical(model), "classes": list(classes)}
    write_json(out / MASK_MANIFEST, manifest)


def _write_pairs(path: Path, real: Any, drawn: Any) -> None:
    """A PNG of two lines: held-out above, drawn below."""
    import numpy as np
    from PIL import Image

    lines = [np.concatenate(list(images), axis=1) for images in (real, drawn)]
    Image.fromarray(np.concatenate(lines, axis=0)).save(path)
