"""The networks of the mask GAN: a SPADE generator, and a discriminator with a spatial and a Fourier branch."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from factory.generators.mask_gan import MaskGAN


class Spade(nn.Module):
    """(1 + γ(s)) · IN(F) + β(s), γ and β by convolutions of a map s (Pan et al. 2025, Eq. 9; Park et al. 2019).

    Deviates: Eq. 9 has γ without the 1 that SPADE has. Borders are replicated, so that a constant s gives the same
    γ and β everywhere.
    """

    def __init__(self, channels: int, map_channels: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(channels)
        self.shared = nn.Conv2d(map_channels, hidden, 3, padding=1, padding_mode="replicate")
        self.gamma = nn.Conv2d(hidden, channels, 3, padding=1, padding_mode="replicate")
        self.beta = nn.Conv2d(hidden, channels, 3, padding=1, padding_mode="replicate")

    def forward(self, features: Tensor, spatial_map: Tensor) -> Tensor:
        """Features (B, C, h, w) and a map (B, M, h, w) → (B, C, h, w)."""
        hidden = torch.relu(self.shared(spatial_map))
        return (1 + self.gamma(hidden)) * self.norm(features) + self.beta(hidden)


class _Block(nn.Module):
    """Nearest × 2, SPADE, ReLU, 3 × 3."""

    def __init__(self, inside: int, outside: int, map_channels: int, hidden: int) -> None:
        super().__init__()
        self.spade = Spade(inside, map_channels, hidden)
        self.convolution = nn.Conv2d(inside, outside, 3, padding=1)

    def forward(self, features: Tensor, spatial_map: Tensor) -> Tensor:
        features = functional.interpolate(features, scale_factor=2, mode="nearest")
        resized = functional.adaptive_avg_pool2d(spatial_map, features.shape[-1])
        return self.convolution(torch.relu(self.spade(features, resized)))


class MaskGenerator(nn.Module):
    """G(z, k, s): noise, class and rectangle → a soft mask."""

    def __init__(self, model: MaskGAN, num_classes: int) -> None:
        super().__init__()
        self.model, self.num_classes = model, num_classes
        width, size = model.channels, model.base_size
        concatenates = model.class_input == "concatenation"
        self.project = nn.Linear(model.noise_dim, width * size * size)
        self.embedding = nn.Embedding(num_classes, model.noise_dim) if concatenates else None
        map_channels = 1 if concatenates else 1 + num_classes
        widths = [max(model.min_channels, width >> n) for n in range(1, model.num_blocks + 1)]
        inside = [width + model.noise_dim * concatenates, *widths[:-1]]
        self.blocks = nn.ModuleList(
            _Block(i, o, map_channels, model.spade_hidden) for i, o in zip(inside, widths)
        )
        self.out = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, noise: Tensor, classes: Tensor, box_maps: Tensor) -> Tensor:
        """Masks 0 … 1.

        Args:
            noise: z, float (B, n).
            classes: int64 (B,).
            box_maps: s, float (B, 1, R, R), 1 inside the rectangle.

        Returns:
            Float (B, 1, R, R).
        """
        size = self.model.base_size
        features = self.project(noise).view(len(noise), -1, size, size)
        spatial_map = box_maps
        if self.embedding is not None:
            constant = self.embedding(classes)[:, :, None, None].expand(-1, -1, size, size)
            features = torch.cat([features, constant], dim=1)
        else:
            one_hot = functional.one_hot(classes, self.num_classes).to(box_maps.dtype)
            everywhere = one_hot[:, :, None, None].expand(-1, -1, *box_maps.shape[2:])
            spatial_map = torch.cat([box_maps, everywhere], dim=1)
        for block in self.blocks:
            features = block(features, spatial_map)
        return torch.sigmoid(self.out(features))


class Judgement(NamedTuple):
    """What the discriminator says of B masks: `realness` logits (B,), and `class_logits` (B, K) or None."""

    realness: Tensor
    class_logits: Tensor | None


class _Branch(nn.Module):
    """Convolutions with stride 2 and instance norm, then a logit by the mean over the frame."""

    def __init__(self, inside: int, model: MaskGAN, num_classes: int) -> None:
        super().__init__()
        widths = [min(8, 1 << n) * model.discriminator_channels for n in range(model.num_blocks)]
        layers: list[nn.Module] = []
        for number, (i, o) in enumerate(zip([inside, *widths[:-1]], widths)):
            layers.append(nn.Conv2d(i, o, 4, stride=2, padding=1))
            # Normalised at both ends, the mean over the frame would lose sizes and contrasts.
            if 0 < number < len(widths) - 1:
                layers.append(nn.InstanceNorm2d(o))
            layers.append(nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(*layers)
        self.realness = nn.Linear(widths[-1], 1)
        self.projection = nn.Embedding(num_classes, widths[-1]) if model.class_term == "projection" else None
        self.width = widths[-1]

    def forward(self, inputs: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (B, C, R, R) and classes (B,) → logits (B,) and features (B, D)."""
        features = self.layers(inputs).mean(dim=(2, 3))
        logits = self.realness(features)[:, 0]
        if self.projection is not None:
            logits = logits + (self.projection(classes) * features).sum(dim=1)
        return logits, features


class MaskDiscriminator(nn.Module):
    """D(M | k, s): a spatial and a Fourier-magnitude branch (Pan et al. 2025, §3.2.3).

    The paper does not say which branch gives which output: here "real" is the sum of both branches' logits, and the
    class, where there is a classifier, comes from the Fourier branch ("frequency-domain cues", Eq. 14).
    """

    def __init__(self, model: MaskGAN, num_classes: int) -> None:
        super().__init__()
        self.spatial = _Branch(2, model, num_classes)
        self.fourier = _Branch(2, model, num_classes)
        classifies = model.class_term != "projection"
        self.classifier = nn.Linear(self.fourier.width, num_classes) if classifies else None

    def forward(self, masks: Tensor, classes: Tensor, box_maps: Tensor) -> Judgement:
        """Masks and rectangles, float (B, 1, R, R), classes int64 (B,)."""
        spatial, _ = self.spatial(torch.cat([masks, box_maps], dim=1), classes)
        magnitudes = torch.cat([fourier_magnitude(masks), fourier_magnitude(box_maps)], dim=1)
        fourier, features = self.fourier(magnitudes, classes)
        return Judgement(spatial + fourier, None if self.classifier is None else self.classifier(features))


def fourier_magnitude(masks: Tensor) -> Tensor:
    """log(1 + |FFT2|) with the zero frequency in the middle, of (B, 1, R, R); blind to circular shifts."""
    spectrum = torch.fft.fftshift(torch.fft.fft2(masks.float(), norm="ortho"), dim=(2, 3))
    # abs() has no gradient at 0; the square does.
    return torch.log1p((spectrum.real.square() + spectrum.imag.square() + 1e-12).sqrt())


def box_maps(boxes: Tensor, resolution: int) -> Tensor:
    """Rectangles int64 (B, 4) as (top, left, bottom, right) → s, float (B, 1, R, R), 1 inside."""
    places = torch.arange(resolution, device=boxes.device)
    top, left, bottom, right = (edge[:, None] for edge in boxes.unbind(dim=1))
    rows = ((places >= top) & (places < bottom)).float()
    columns = ((places >= left) & (places < right)).float()
    return (rows[:, :, None] * columns[:, None, :])[:, None]


def box_iou(masks: Tensor, boxes: Tensor) -> Tensor:
    """IoU of each mask's bounding box with its rectangle, with a gradient: float (B,).

    The largest value of each row and column stands for whether the box covers it; exact for binary masks.

    Args:
        masks: float (B, 1, R, R), 0 … 1.
        boxes: int64 (B, 4), not empty.
    """
    wanted = box_maps(boxes, masks.shape[-1])
    rows, columns = (masks.amax(dim=(1, axis)) for axis in (3, 2))
    wanted_rows, wanted_columns = (wanted.amax(dim=(1, axis)) for axis in (3, 2))
    shared = (rows * wanted_rows).sum(1) * (columns * wanted_columns).sum(1)
    union = rows.sum(1) * columns.sum(1) + wanted_rows.sum(1) * wanted_columns.sum(1) - shared
    return shared / union
