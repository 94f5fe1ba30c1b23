"""Region-aware attention: words are taught where in the image they belong (Shentu et al. 2025, §2.3)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from factory.diffusion.layout_guidance import LESION_AND_SKIN, WordRegions, check_tokens
from factory.training.objectives import TrainingContext

if TYPE_CHECKING:
    from factory.training.bound_region_attention import BoundRegionAttention

RegionForm = Literal["normalised", "paper"]


@dataclass(frozen=True, kw_only=True)
class RegionAttention:
    """Distance of the words' cross-attention maps from their regions (Shentu et al. 2025, Eqs. 3 and 4).

    The two forms are different objectives, since a softmax over 77 tokens rarely comes near 1:

    - "normalised" (default, the authors' code): each map is stretched to 0 … 1, and the squared error is averaged over
      cells and words. Deviates: the mask is reduced to the covered share of each cell, where the code resizes it
      bicubically (which leaves 0 … 1).
    - "paper" (Eq. 3): the squared error of the raw probabilities, summed over cells, averaged over words (the printed
      ½ for two of them).

    A word that a prompt lacks contributes 0; so does the null prompt. An image with an empty (or full) mask
    contributes 0 to "normalised", since a stretched map cannot be constant, and its distance from the constant
    region to "paper".

    Attributes:
        weight: α.
        side: of the cross-attention maps that are read; Stable Diffusion at 512 px has 64, 32, 16, 8.
        form: "normalised" or "paper".
        tokens: words of the prompt, and whether each belongs inside or outside the mask.
    """

    weight: float = 0.1
    side: int = 16
    form: RegionForm = "normalised"
    tokens: WordRegions = LESION_AND_SKIN

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"objectives.RegionAttention.weight: want a positive number, got {self.weight}")
        if self.side < 1:
            raise ValueError(f"objectives.RegionAttention.side: want at least 1, got {self.side}")
        if self.form not in get_args(RegionForm):
            raise ValueError(f"objectives.RegionAttention.form={self.form!r}: want normalised or paper")
        check_tokens("objectives.RegionAttention", self.tokens)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("masks",)

    @property
    def words(self) -> tuple[str, ...]:
        """Words that every prompt must have."""
        return tuple(word for word, _ in self.tokens)

    def bind(self, context: TrainingContext) -> "BoundRegionAttention":
        """The objective at work.

        Raises:
            ValueError: the UNet has no cross-attention of this side, no prompt has the words, or gradient
                checkpointing is on (maps taken inside a checkpointed layer carry no gradient).
        """
        from factory.training.bound_region_attention import BoundRegionAttention

        return BoundRegionAttention(self, context)
