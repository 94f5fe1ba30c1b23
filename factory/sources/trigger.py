"""A trigger word as the prompt: one rare token that fine-tuning ties to the lesion."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from factory.imaging import TrainingRow
from factory.sources.prompts import PromptDraw
from factory.sources.rows import rows_digest
from schemas.request import SynthesisRequest


@dataclass(frozen=True, kw_only=True)
class TriggerWord:
    """The same prompt for every image (Xie et al. 2025, §2.1): "hta" is one rare token of CLIP's vocabulary.

    Attributes:
        prompt: the paper's by default; the authors' code uses "a photo of hta".
        append_label: writes the class behind it, so that one model serves several classes (not in the paper,
            which trains one model per dataset).
    """

    prompt: str = "An image of hta"
    append_label: bool = False

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError(
                "prompts.TriggerWord.prompt: want a prompt with the trigger word, got an empty one"
            )

    def write(self, label: str) -> str:
        """The prompt of a class."""
        return f"{self.prompt}, {label}" if self.append_label else self.prompt

    def fit(self, rows: Sequence[TrainingRow]) -> "FittedTriggerWord":
        """Nothing is fitted; the rows' digest is recorded all the same."""
        return FittedTriggerWord(source=self, fitted_on=rows_digest(rows))


@dataclass(frozen=True, kw_only=True)
class FittedTriggerWord:
    """`TriggerWord`, ready to draw."""

    source: TriggerWord
    fitted_on: str

    def draw(
        self, request: SynthesisRequest, rng: np.random.Generator, mask: np.ndarray | None
    ) -> PromptDraw:
        """The prompt of the request's class; draws nothing."""
        return PromptDraw(
            prompt=self.source.write(request.label), parameters={"prompt_source": "trigger_word"}
        )

    def describe(self, row: TrainingRow) -> str:
        """The prompt that a training row is trained with."""
        return self.source.write(row.label_name)
