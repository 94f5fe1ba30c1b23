"""Sources of prompts: the text that goes with a requested mask, and with every training image."""

import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from factory import geometry
from factory.imaging import TrainingRow
from factory.sources.labeller import BiradsDescriptor, BiradsLabeller, FittedBiradsLabeller
from factory.sources.rows import lesion_rows_by_label, rows_digest
from schemas.request import SynthesisRequest


@dataclass(frozen=True, kw_only=True)
class PromptDraw:
    """A prompt and what was drawn to write it."""

    prompt: str
    parameters: Mapping[str, float | int | str]


def _check_template(name: str, template: str, allowed: set[str]) -> None:
    try:
        fields = {f for _, f, _, _ in string.Formatter().parse(template) if f is not None}
    except ValueError as error:
        raise ValueError(f"{name}: {template!r} is no format string ({error})") from error
    if not fields <= allowed:
        unknown = ", ".join(sorted("{" + f + "}" for f in fields - allowed))
        raise ValueError(f"{name}: unknown field(s) {unknown}; it may use {', '.join(sorted(allowed))}")


@dataclass(frozen=True, kw_only=True)
class BiradsTemplate:
    """The clinical template of Pan et al. 2025 (MICCAI, §2.2): two labels × echogenicity × boundary, 8 strings.

    Descriptors of a request are not drawn on their own: the pair is that of a training row of the same label
    whose lesion resembles the drawn mask, so that their correlations with each other, with the label and
    with the shape survive.

    Attributes:
        template: for images with a lesion.
        template_without_lesion: for classes and rows without one.
        labeller: gives training rows their descriptors.
        resemblance: measures of the mask that are compared. "solidity" suits sources whose masks are as
            irregular as the training masks; ellipses are smoother, and would always be paired with the
            smoothest malignant rows.
        neighbours: training rows among which one is chosen; fewer tie the pair more closely to the shape.
    """

    template: str = (
        "breast ultrasound image of {label} tumor with {echogenicity} echogenicity and {boundary} boundary."
    )
    template_without_lesion: str = "breast ultrasound image of {label} tissue."
    labeller: BiradsLabeller = field(default_factory=BiradsLabeller)
    resemblance: tuple[Literal["area", "aspect", "solidity"], ...] = ("area", "aspect")
    neighbours: int = 12

    def __post_init__(self) -> None:
        if not self.resemblance or not set(self.resemblance) <= {"area", "aspect", "solidity"}:
            raise ValueError(f"resemblance: want some of area, aspect, solidity, got {self.resemblance}")
        _check_template("template", self.template, {"label", "echogenicity", "boundary"})
        _check_template("template_without_lesion", self.template_without_lesion, {"label"})
        if self.neighbours < 1:
            raise ValueError(f"neighbours: want ≥ 1, got {self.neighbours}")

    def fit(self, rows: Sequence[TrainingRow]) -> "FittedBiradsTemplate":
        """Thresholds of the labeller, and shape and descriptors of every row with a lesion.

        Raises:
            ValueError: no row has a lesion, or a label has rows but none of them has a mask.
        """
        labeller = self.labeller.fit(rows)
        classes = {}
        for label, members in lesion_rows_by_label(rows).items():
            shapes = [_shape(row.mask, self.resemblance) for row in members if row.mask is not None]
            classes[label] = TrainingLesions(
                image_ids=tuple(row.image_id for row in members),
                shapes=np.array(shapes, np.float64).reshape(-1, len(self.resemblance)),
                descriptors=tuple(labeller.describe(row) for row in members),
            )
        return FittedBiradsTemplate(
            source=self, labeller=labeller, classes=classes, fitted_on=rows_digest(rows)
        )

    def write(self, label: str, descriptor: BiradsDescriptor | None) -> str:
        """The prompt of a label, with or without a lesion."""
        if descriptor is None:
            return self.template_without_lesion.format(label=label)
        return self.template.format(
            label=label, echogenicity=descriptor.echogenicity, boundary=descriptor.boundary
        )


def _shape(mask: np.ndarray, measures: Sequence[str]) -> list[float]:
    """Measures of the largest component that are the same at any resolution; area and aspect as logarithms."""
    lesion = geometry.largest_component(mask)
    m = geometry.moments(lesion)
    assert m is not None
    values = {"area": math.log(m.area / mask.size), "aspect": math.log(m.aspect)}
    if "solidity" in measures:
        values["solidity"] = geometry.solidity(lesion)
    return [values[name] for name in measures]


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingLesions:
    """Lesions of one label: `shapes` is (n, number of measures), the others have n entries; n = 0 without lesions."""

    image_ids: tuple[str, ...]
    shapes: np.ndarray
    descriptors: tuple[BiradsDescriptor, ...]

    def nearest(self, shape: Sequence[float], k: int) -> np.ndarray:
        """Indices of the k rows nearest to `shape`, each measure in units of its own deviation; stable order."""
        spread = self.shapes.std(axis=0)
        scaled = (self.shapes - np.asarray(shape)) / np.where(spread > 0, spread, 1.0)
        return np.argsort((scaled**2).sum(axis=1), kind="stable")[:k]


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedBiradsTemplate:
    """`BiradsTemplate` with the training rows' shapes and descriptors: see there."""

    source: BiradsTemplate
    labeller: FittedBiradsLabeller
    classes: Mapping[str, TrainingLesions] = field(repr=False)
    fitted_on: str

    def draw(
        self, request: SynthesisRequest, rng: np.random.Generator, mask: np.ndarray | None
    ) -> PromptDraw:
        """The prompt for a request and its drawn mask (any size; empty or None: no lesion).

        Raises:
            ValueError: the label has no training rows, or the mask has a lesion but its class has none.
        """
        if request.label not in self.classes:
            raise ValueError(f"label {request.label!r}: no training row to take descriptors from")
        if mask is None or not mask.any():
            prompt = self.source.write(request.label, None)
            return PromptDraw(prompt=prompt, parameters={"prompt_source": "birads_template"})
        lesions = self.classes[request.label]
        if not lesions.descriptors:
            raise ValueError(f"label {request.label!r}: the mask has a lesion, but no training row of it has")
        nearest = lesions.nearest(_shape(mask, self.source.resemblance), self.source.neighbours)
        chosen = int(nearest[rng.integers(len(nearest))])
        descriptor = lesions.descriptors[chosen]
        return PromptDraw(
            prompt=self.source.write(request.label, descriptor),
            parameters={
                "prompt_source": "birads_template",
                "echogenicity": descriptor.echogenicity,
                "boundary": descriptor.boundary,
                "descriptors_of": lesions.image_ids[chosen],
            },
        )

    def describe(self, row: TrainingRow) -> str:
        """The prompt that a training row is trained with."""
        if row.mask is None or not row.mask.any():
            return self.source.write(row.label_name, None)
        return self.source.write(row.label_name, self.labeller.describe(row))


@dataclass(frozen=True, kw_only=True)
class LabelPrompt:
    """A prompt that names the label and nothing else.

    Attributes:
        template: may use {label}.
    """

    template: str = "ultrasound image, {label}"

    def __post_init__(self) -> None:
        _check_template("template", self.template, {"label"})

    def fit(self, rows: Sequence[TrainingRow]) -> "FittedLabelPrompt":
        """Nothing is fitted; the rows' digest is recorded all the same."""
        return FittedLabelPrompt(source=self, fitted_on=rows_digest(rows))


@dataclass(frozen=True, kw_only=True)
class FittedLabelPrompt:
    """`LabelPrompt`, ready to draw."""

    source: LabelPrompt
    fitted_on: str

    def draw(
        self, request: SynthesisRequest, rng: np.random.Generator, mask: np.ndarray | None
    ) -> PromptDraw:
        """The label's prompt; draws nothing."""
        prompt = self.source.template.format(label=request.label)
        return PromptDraw(prompt=prompt, parameters={"prompt_source": "label_prompt"})

    def describe(self, row: TrainingRow) -> str:
        """The prompt that a training row is trained with."""
        return self.source.template.format(label=row.label_name)
