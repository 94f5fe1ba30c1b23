"""Layout guidance: the requested mask steers where a word's attention lies (Shentu et al. 2025, §2.4)."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from factory.diffusion.bound_layout_guidance import BoundLayoutGuidance
    from factory.diffusion.guidance import DenoisingBatch

Side = Literal["inside", "outside"]
WordRegions = tuple[tuple[str, Side], ...]
Schedule = Literal["sqrt", "constant"]
CrossForm = Literal["contrast", "paper"]
SelfReduction = Literal["mean_over_mask", "code", "paper"]
LESION_AND_SKIN: WordRegions = (("<lesion>", "inside"), ("<skin>", "outside"))


@dataclass(frozen=True, kw_only=True)
class LayoutGuidance:
    """z ← z − η ∇_z (L_CA + w · L_SA) before each of the first steps (Shentu et al. 2025, Eq. 6).

    Deviations from the paper's text; the literal form is one argument away:

    - `schedule`: the authors' code lets η fall over the loop, η·√linspace(1, ½); "constant" is the paper's.
    - `cross_form`: "contrast" follows the code: a softmax over the words' tokens of 100 × attention, then
      (1 − mean inside the region) + (mean outside). BOS, EOS and padding are taken out first, which the code does
      not do: they draw most of the attention. "paper" is Eq. 3, ½ Σ ‖A − M‖², on the raw maps.
    - `smoothing`: the paper filters the cross maps with a Gaussian, the code does not; .5 is the value of the work
      they cite (Chefer et al. 2023).
    - `self_reduction`: "mean_over_mask" is the attention that leaves the region, averaged over the region's cells
      (Phung et al. 2024, which Eq. 5 cites): between 0 and 1, beside a cross term near 1. "paper" is Eq. 5, the sum
      over cells divided by the area outside; "code" averages that, and is about a thousandth of the cross term.

    The gradient is that of the loss summed over the batch, so that an image does not depend on its neighbours, and is
    kept in float32 (inside a half-precision denoiser it passes through that precision). Masks are reduced to the
    covered share of each cell. An empty mask drives <lesion> away everywhere.

    Attributes:
        eta: step length η; 0 leaves the trajectory as it is.
        schedule: "sqrt" or "constant".
        tokens: words of the prompt, and whether each belongs inside or outside the mask.
        cross_side, self_side: sides of the attention maps that are read. Stable Diffusion at 512 px has 64, 32, 16, 8.
        cross_form: "contrast" or "paper".
        temperature: factor before the softmax over tokens.
        smoothing: sigma of the Gaussian on the cross maps, cells; 0 for none.
        self_weight: w.
        self_reduction: "mean_over_mask", "code" or "paper".
        start, stop: fractions of the loop.
    """

    eta: float = 20.0
    schedule: Schedule = "sqrt"
    tokens: WordRegions = LESION_AND_SKIN
    cross_side: int = 16
    self_side: int = 32
    cross_form: CrossForm = "contrast"
    temperature: float = 100.0
    smoothing: float = 0.0
    self_weight: float = 1.0
    self_reduction: SelfReduction = "mean_over_mask"
    start: float = 0.0
    stop: float = 0.5

    def __post_init__(self) -> None:
        for name, kinds in (
            ("schedule", Schedule),
            ("cross_form", CrossForm),
            ("self_reduction", SelfReduction),
        ):
            value = getattr(self, name)
            if value not in get_args(kinds):
                raise ValueError(f"LayoutGuidance.{name}={value!r}: want one of {', '.join(get_args(kinds))}")
        for name in ("eta", "smoothing", "self_weight"):
            value = getattr(self, name)
            if not 0.0 <= value < math.inf:
                raise ValueError(f"LayoutGuidance.{name}={value}: want a finite number of at least 0")
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(f"LayoutGuidance.temperature={self.temperature}: want a positive number")
        if self.cross_side < 1 or self.self_side < 1:
            raise ValueError(
                f"LayoutGuidance.cross_side={self.cross_side}, self_side={self.self_side}: want at least 1"
            )
        if not 0.0 <= self.start <= self.stop <= 1.0:
            raise ValueError(
                f"LayoutGuidance.start={self.start}, stop={self.stop}: want 0 ≤ start ≤ stop ≤ 1"
            )
        check_tokens("LayoutGuidance", self.tokens)

    @property
    def words(self) -> tuple[str, ...]:
        """Words that every prompt must have."""
        return tuple(word for word, _ in self.tokens)

    def eta_at(self, index: int, num_steps: int) -> float:
        """η of step `index` of `num_steps`."""
        if self.schedule == "constant":
            return self.eta
        return self.eta * math.sqrt(1.0 - 0.5 * index / max(1, num_steps - 1))

    def bind(self, batch: "DenoisingBatch") -> "BoundLayoutGuidance":
        """The guidance of one batch.

        Raises:
            ValueError: the batch has no masks, or a prompt lacks one of the words.
        """
        from factory.diffusion.bound_layout_guidance import BoundLayoutGuidance

        return BoundLayoutGuidance(self, batch)


def check_tokens(owner: str, tokens: WordRegions) -> None:
    """Raises ValueError unless `tokens` are distinct words, each "inside" or "outside"."""
    words = [word for word, _ in tokens]
    if not words or len(set(words)) < len(words) or not all(words):
        raise ValueError(f"{owner}.tokens: want at least one word, each once; got {words}")
    for word, side in tokens:
        if side not in get_args(Side):
            raise ValueError(f"{owner}.tokens: {word!r} is {side!r}; want inside or outside")
