"""What a training run is asked to do, its identity, and the checks before any compute. No torch."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from factory.diffusion.sampling import Sampling
from factory.generators.checkpoints import MANIFEST, digest_parts, read_manifest
from factory.generators.conditioning import ClassLabel
from factory.generators.latent_diffusion import LatentDiffusion
from factory.imaging import TrainingRow, decode_rows
from factory.training.objectives import PREDICTION_TYPES, Objective
from factory.training.run_identity import read_identity
from factory.training.settings import TrainingSettings
from schemas.identity import canonical

ROW_COLUMNS = ("image_id", "label", "label_name", "group_id", "image", "mask", "attributes")


class FittedPrompts(Protocol):
    """Says which prompt a training row is trained with."""

    def describe(self, row: TrainingRow) -> str: ...


class PromptSource(Protocol):
    """A component that fits prompts on the training rows."""

    def fit(self, rows: Sequence[TrainingRow]) -> FittedPrompts: ...


@dataclass(frozen=True, kw_only=True)
class TrainingTask:
    """Everything a training process needs to know; picklable.

    Attributes:
        recipe: name, recorded with the generator.
        generator: what is trained, upon which base.
        objectives: losses.
        settings: optimisation.
        prompts: describes the training rows.
        sampling: how preview images are drawn.
        real: the real table.
        real_version: the version of it that is read.
        out: the run's folder, absolute; on several machines on storage that all of them see.
        adapt_from: a trained generator whose weights become the frozen ground (a new domain), or None.
    """

    recipe: str
    generator: LatentDiffusion
    objectives: tuple[Objective, ...]
    settings: TrainingSettings
    prompts: PromptSource
    sampling: Sampling
    real: str
    real_version: int
    out: Path
    adapt_from: Path | None = None

    @property
    def needs(self) -> frozenset[str]:
        """Columns of a training row beside its image that the conditioning or an objective uses."""
        conditioning = self.generator.conditioning
        masks = ("masks",) if conditioning.uses_mask or conditioning.uses_inpaint else ()
        return frozenset(masks).union(*(objective.needs for objective in self.objectives))


def adapted(generator: LatentDiffusion, lora_rank: int) -> LatentDiffusion:
    """The generator of a new domain: only LoRA adapters train, everything below stays (paper 001, §2.3)."""
    trainable = replace(generator.trainable, unet="lora", controlnet=False, lora_rank=lora_rank)
    return replace(generator, trainable=trainable)


def _prompt_tables(task: TrainingTask) -> dict[str, str]:
    """Digests of the tables that the prompts are read from; FileNotFoundError where one is missing."""
    return dict(getattr(task.prompts, "weights", dict)())


def finished_step(task: TrainingTask) -> int | None:
    """Up to which step the run in `task.out` is finished and saved; None where it is not."""
    record = read_identity(task.out)
    return None if record is None or not (task.out / MANIFEST).is_file() else record.get("finished_step")


def identity_of(task: TrainingTask) -> dict[str, Any]:
    """What fixes the trained weights, as plain data. `max_steps` is left out: asking for more goes on."""
    from factory.storage import open_table, real_digest

    settings = canonical(task.settings)
    del settings["max_steps"]
    table = open_table(task.real, version=task.real_version)
    return {
        "recipe": task.recipe,
        "generator": canonical(task.generator),
        "objectives": canonical(task.objectives),
        "sketches": [o.extractor.digest() for o in task.objectives if hasattr(o, "extractor")],
        "training": settings,
        "prompts": canonical(task.prompts),
        "prompt_tables": _prompt_tables(task),
        **task.generator.ground(),
        "adapt_from": digest_parts(task.adapt_from) if task.adapt_from else None,
        "real": real_digest(table),
    }


def check_task(task: TrainingTask, num_workers: int) -> None:
    """Everything that can be known to fail, before any model is loaded.

    Raises:
        ValueError, FileNotFoundError, PermissionError: naming the field, table or folder and what to do.
    """
    task.settings.check_world_size(num_workers)
    _prompt_tables(task)
    _check_rows(task)
    task.generator.weights()
    _check_base(task.generator)
    if task.adapt_from is not None:
        read_manifest(task.adapt_from)
    _check_out(task.out)


def _check_out(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: cannot make this folder ({error.strerror})") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise PermissionError(f"--out {out}: not writable")
    known = {"checkpoints", "samples", "controlnet", "unet", "unet_lora", "training.json", "generator.json",
             "metrics.jsonl", ".ray"}  # fmt: skip
    foreign = sorted(path.name for path in out.iterdir() if path.name not in known)
    if foreign and not (out / "training.json").exists():
        raise ValueError(f"--out {out}: holds other files ({foreign[0]}, …); choose an empty or a new folder")


def _check_base(generator: LatentDiffusion) -> None:
    folder = generator.base_folder()
    levels = [
        len(json.loads((folder / part / "config.json").read_text())["block_out_channels"])
        for part in ("vae", "unet")
    ]
    multiple = 2 ** (sum(levels) - 2)
    if generator.resolution % multiple:
        raise ValueError(
            f"generator.resolution: {generator.resolution} px, but the base {generator.base} needs a multiple of {multiple}"
        )
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"generator.base: {generator.base} predicts {prediction_type!r}; training knows {', '.join(PREDICTION_TYPES)}"
        )


def _check_rows(task: TrainingTask) -> None:
    from factory.storage import class_names, open_table

    table = open_table(task.real, version=task.real_version)
    missing = [name for name in (*ROW_COLUMNS, "split") if name not in table.schema.names]
    if missing:
        raise ValueError(
            f"--real {task.real}: no column {', '.join(missing)}; `factory prepare` makes such tables"
        )
    names = class_names(table)
    labels = table.read(["label"], filter="split = 'train'")["label"].to_numpy()
    if not len(labels):
        raise ValueError(
            f"--real {task.real}: no row in split 'train'; prepare it with a training share above 0"
        )
    empty = [name for number, name in enumerate(names) if not (labels == number).any()]
    if empty:
        raise ValueError(
            f"--real {task.real}: no training row of class {', '.join(empty)}; prepare the table with more images "
            "of it, or without the class"
        )
    if "masks" in task.needs:
        lacking = table.read(["image_id"], filter="split IN ('train', 'val') AND mask IS NULL", limit=1)
        if len(lacking):
            count = table.count("split IN ('train', 'val') AND mask IS NULL")
            raise ValueError(
                f"--real {task.real}: {count} training or validation rows have no mask (first: image_id "
                f"{lacking['image_id'][0].as_py()}), but recipe {task.recipe} trains with masks; use a dataset with "
                "masks (empty masks for images without a lesion), or a recipe without (`factory recipes`)"
            )
    conditioning = task.generator.conditioning
    if isinstance(conditioning, ClassLabel) and len(names) > conditioning.num_classes:
        raise ValueError(
            f"--real {task.real}: {len(names)} classes, but the generator has {conditioning.num_classes}; "
            f"give --generator.conditioning.num-classes {len(names)}"
        )


def load_rows(task: TrainingTask, split: str) -> list[TrainingRow]:
    """Decoded rows of a split at the generator's resolution, in the order of image_id."""
    from factory.storage import real_rows

    table = real_rows(task.real, splits=(split,), columns=ROW_COLUMNS, version=task.real_version)
    return decode_rows(table.sort_by("image_id"), task.generator.resolution)


def usable_rows(task: TrainingTask, rows: Sequence[TrainingRow]) -> list[TrainingRow]:
    """The rows that have what the objectives look at."""
    if "lesions" not in task.needs:
        return list(rows)
    return [row for row in rows if row.mask is not None and row.mask.any()]


def training_rows(task: TrainingTask, rows: Sequence[TrainingRow]) -> list[TrainingRow]:
    """Of the rows of the split train those that are trained on: usable ones, at most `max_rows`, by image_id.

    Raises:
        ValueError: none is left.
    """
    usable = usable_rows(task, rows)
    if not usable:
        raise ValueError(
            f"--real {task.real}: no training row has a lesion in its mask, and recipe {task.recipe} trains on lesions"
        )
    if task.settings.max_rows is None:
        return usable
    return sorted(choose_rows(usable, task.settings.max_rows), key=lambda row: row.image_id)


def choose_rows(rows: Sequence[TrainingRow], count: int) -> list[TrainingRow]:
    """At most `count` rows, the classes in turn, in the order of image_id: the same whatever the table's order."""
    by_label: dict[int, list[TrainingRow]] = {}
    for row in sorted(rows, key=lambda row: row.image_id):
        by_label.setdefault(row.label, []).append(row)
    chosen: list[TrainingRow] = []
    for place in range(max(map(len, by_label.values()), default=0)):
        chosen += [by_label[label][place] for label in sorted(by_label) if place < len(by_label[label])]
    return chosen[:count]
