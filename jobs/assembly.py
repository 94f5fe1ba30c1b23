"""A recipe's components put to work: the same assembly for synthesis and for making one row again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from factory.imaging import TrainingRow
from factory.recipes import Recipe
from factory.synthesis.stages import RequestStage, SynthesizerSettings
from schemas.request import SynthesisPlan


def all_weights(recipe: Recipe, generator: Path, adapters: Sequence[Path]) -> dict[str, str]:
    """Digest of everything beside the real rows that fixes the images: weights, and tables that sources read.

    Raises:
        FileNotFoundError, ValueError: something is missing or does not belong together; says what makes it.
    """
    digests = recipe.generator.weights(generator, tuple(adapters))
    for source in (recipe.masks, recipe.prompts, recipe.backgrounds):
        found: Mapping[str, str] = getattr(source, "weights", dict)()
        digests |= found
    return digests


def make_request_stage(recipe: Recipe, plan: SynthesisPlan, rows: Sequence[TrainingRow]) -> RequestStage:
    """The first stage of the stream: the recipe's sources, fitted on the training rows."""
    return RequestStage(
        plan=plan,
        masks=None if recipe.masks is None else recipe.masks.fit(rows),
        prompts=recipe.prompts.fit(rows),
        backgrounds=None if recipe.backgrounds is None else recipe.backgrounds.fit(rows),
    )


def in_colour(rows: Sequence[TrainingRow]) -> bool:
    """Whether synthetic images keep three channels: where most training images have them.

    A few grey images with coloured marks do not make a dataset of colour images.
    """
    return 2 * sum(row.image.ndim == 3 for row in rows) > len(rows)


def synthesizer_settings(
    recipe: Recipe, generator: Path, adapters: Sequence[Path], *, colour: bool, **execution: Any
) -> SynthesizerSettings:
    """The second stage's settings; `execution` are its batch size, device and the like."""
    return SynthesizerSettings(
        generator=recipe.generator,
        checkpoint=str(generator.resolve()),
        adapters=tuple(str(adapter.resolve()) for adapter in adapters),
        sampling=recipe.sampling,
        guidances=recipe.guidances,
        annotator=recipe.annotator,
        colour=colour,
        feather=0.0 if recipe.backgrounds is None else recipe.backgrounds.feather,
        **execution,
    )
