"""The sketch decoder at work: features of the UNet's encoder in, logits of a sketch out."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from factory.training.bound_objective import BoundObjective
from factory.training.objectives import PredictionStep

if TYPE_CHECKING:
    from factory.training.sketch_perception import SketchPerception

EDGE = 0.5
"""Level of a sketch from which a pixel counts as an edge."""


class SketchBranch(BoundObjective):
    """`SketchPerception` with its decoder.

    Args:
        source: the component.
        feature_channels: channels of the UNet's encoder, by resolution.
        latent_side: h, to which all features are brought.
        resolution: R, side of the sketch, px; h · 2^k.
        seed: of the decoder's weights.
    """

    def __init__(
        self,
        source: "SketchPerception",
        *,
        feature_channels: Sequence[int],
        latent_side: int,
        resolution: int,
        seed: int,
    ) -> None:
        super().__init__()
        doublings = math.log2(resolution / latent_side)
        if doublings != int(doublings) or doublings < 0:
            raise ValueError(
                f"resolution={resolution}: SketchPerception wants the latent side {latent_side} times a power of two"
            )
        self._source, self._side = source, latent_side
        self._features: list[Tensor] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            width = source.channels
            self.projections = nn.ModuleList(nn.Conv2d(c, width, 1) for c in feature_channels)
            self.decoder = _decoder(width * len(feature_channels), width, int(doublings))

    @contextlib.contextmanager
    def capture(self, denoiser: nn.Module) -> Iterator[None]:
        """Takes the features of each encoder block, before it halves the resolution, while the denoiser runs."""
        unet: Any = denoiser.unet
        self._features = []

        def take(block: Any, arguments: Any, output: tuple[Tensor, Sequence[Tensor]]) -> None:
            states = output[1]
            self._features.append(states[-1] if block.downsamplers is None else states[-2])

        handles = [block.register_forward_hook(take) for block in unet.down_blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def forward(self) -> Tensor:
        """Logits of the sketch, (B, R, R), of what was captured."""
        features, self._features = self._features, []
        assert len(features) == len(self.projections), "no features were captured"
        resized = [
            nn.functional.interpolate(
                project(feature), (self._side, self._side), mode="bilinear", align_corners=False
            )
            for project, feature in zip(self.projections, features)
        ]
        return self.decoder(torch.cat(resized, dim=1))[:, 0]

    def loss(self, step: PredictionStep, output: Tensor) -> Tensor:
        """Timestep-weighted sketch loss of each image, float32 (B,).

        min-SNR weights belong to the denoising error and are not applied.

        Raises:
            ValueError: the step has no sketches.
        """
        wanted, logits = _wanted(step, output), output.float()
        if self._source.loss == "balanced":
            pixels = nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
            loss = balanced_mean(pixels, wanted >= EDGE)
        else:
            loss = (logits.sigmoid() - wanted).abs().mean(dim=(1, 2))
        return self.timestep_weights(step) * loss

    def timestep_weights(self, step: PredictionStep) -> Tensor:
        """√ᾱ_t or √α_t of each image, (B,)."""
        alphas = step.alphas_cumprod.float()
        if self._source.timestep_weight == "paper":
            alphas = alphas / torch.cat([alphas.new_ones(1), alphas[:-1]])
        return alphas[step.timesteps].sqrt()

    def metrics(self, step: PredictionStep, output: Tensor) -> Mapping[str, Tensor]:
        """Unweighted error of the sketch, and of the constant zero, (B,) each: plain L1 for the paper's loss.

        For the balanced one, L1 to the binary edges: every constant has .5, a perfect sketch 0.
        """
        wanted = _wanted(step, output)
        with torch.no_grad():
            return {
                "sketch_error": self._error(output.float().sigmoid(), wanted),
                "sketch_error_of_zero": self._error(torch.zeros_like(wanted), wanted),
            }

    def _error(self, sketch: Tensor, wanted: Tensor) -> Tensor:
        if self._source.loss == "paper":
            return (sketch - wanted).abs().mean(dim=(1, 2))
        edges = wanted >= EDGE
        return balanced_mean((sketch - edges.float()).abs(), edges)


def balanced_mean(values: Tensor, edges: Tensor) -> Tensor:
    """Mean of the mean over edges and the mean over the rest, (B,), of values (B, R, R); `edges` is bool (B, R, R).

    An image without edges gives half the mean over its pixels.
    """
    on, off = edges.to(values.dtype), (~edges).to(values.dtype)
    over_edges = (values * on).sum(dim=(1, 2)) / on.sum(dim=(1, 2)).clamp(min=1)
    over_rest = (values * off).sum(dim=(1, 2)) / off.sum(dim=(1, 2)).clamp(min=1)
    return (over_edges + over_rest) / 2


def _wanted(step: PredictionStep, output: Tensor) -> Tensor:
    if "sketches" not in step.extras:
        raise ValueError("objectives.SketchPerception: the training rows have no sketches")
    return step.extras["sketches"].to(output.device).float() / 255


def _decoder(inside: int, width: int, doublings: int) -> nn.Sequential:
    """3×3 convolution, then `doublings` transposed convolutions of stride 2, the last to one channel."""
    layers: list[nn.Module] = [nn.Conv2d(inside, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
    for number in range(doublings):
        outside = max(16, width // 2)
        last = number == doublings - 1
        layers.append(nn.ConvTranspose2d(width, 1 if last else outside, 4, stride=2, padding=1))
        if not last:
            layers += [nn.GroupNorm(8, outside), nn.SiLU()]
            width = outside
    if doublings == 0:
        layers.append(nn.Conv2d(width, 1, 1))
    return nn.Sequential(*layers)
