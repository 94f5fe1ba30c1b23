"""What a part of a recipe learns from, and by: its decoded rows, its lesion classes, its learner.

No torch until a learner is made.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from factory.generators.mask_diffusion import MaskDDPM
from factory.generators.mask_gan import MaskGAN
from factory.imaging import TrainingRow, decode_rows
from factory.training.task import ROW_COLUMNS
from factory.training.vae_stage import VAEStage

if TYPE_CHECKING:
    from factory.training.parts import PartTask
    from factory.training.world import World


def part_rows(task: "PartTask", split: str) -> list[TrainingRow]:
    """Decoded rows of a split at the part's resolution, in the order of image_id: those that the part can learn from."""
    from factory.storage import real_rows

    table = real_rows(task.real, splits=(split,), columns=ROW_COLUMNS, version=task.real_version)
    rows = decode_rows(table.sort_by("image_id"), task.resolution)
    if task.part == "vae":
        return rows
    if task.part == "segmenter":
        return [row for row in rows if row.mask is not None]
    return [row for row in rows if row.mask is not None and row.mask.any()]


def lesion_classes(task: "PartTask", rows: Sequence[TrainingRow]) -> tuple[str, ...]:
    """Names of the classes with lesions, in the table's order; none for the VAE.

    Raises:
        ValueError: no row has a lesion.
    """
    from factory.storage import class_names, open_table

    if task.part == "vae":
        return ()
    found = {row.label_name for row in rows}
    names = class_names(open_table(task.real, version=task.real_version))
    classes = tuple(name for name in names if name in found)
    if not classes:
        raise ValueError(f"--real {task.real}: no training row has a lesion in its mask")
    return classes


def make_learner(
    task: "PartTask",
    rows: Sequence[TrainingRow],
    held_out: Sequence[TrainingRow],
    classes: tuple[str, ...],
    world: "World",
) -> tuple[Any, int, int]:
    """The learner with fresh weights, and the numbers of its training and held-out rows."""
    import torch

    from schemas.identity import torch_seed

    torch.manual_seed(torch_seed(f"training/{task.settings.seed}", "init") % 2**31)
    if isinstance(task.component, VAEStage):
        from factory.training.vae_learner import VAELearner, load_vae

        vae_learner = VAELearner(
            vae=load_vae(task.generator.base_folder()),
            rows=rows,
            kl_weight=task.component.kl_weight,
            settings=task.settings,
            world=world,
            held_out=held_out,
        )
        return vae_learner, len(rows), len(held_out)
    from factory.training.mask_batches import lesions_of
    from factory.training.mask_learners import MaskDDPMLearner, MaskGANLearner

    lesions = lesions_of(rows, classes)
    others = lesions_of([row for row in held_out if row.label_name in classes], classes)
    learner: Any
    if isinstance(task.component, MaskGAN):
        learner = MaskGANLearner(
            model=task.component,
            lesions=lesions,
            held_out=others,
            settings=task.settings,
            world=world,
            networks=task.component.networks(len(classes)),
        )
    else:
        assert isinstance(task.component, MaskDDPM), task.part
        learner = MaskDDPMLearner(
            denoiser=task.component.network(len(classes)),
            lesions=lesions,
            held_out=others,
            settings=task.settings,
            world=world,
        )
    return learner, len(lesions.masks), len(others.masks)
