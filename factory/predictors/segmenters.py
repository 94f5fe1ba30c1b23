"""Lesion segmenters: networks of MONAI by width, and of segmentation_models_pytorch on any timm encoder.

    Segmenter()                                                       U-Net of about 0.5 M parameters
    Segmenter(architecture="dynunet", width=32)                       nnU-Net's network
    Segmenter(architecture="unet", encoder="resnet18")
    Segmenter(architecture="upernet", encoder="swin_tiny_patch4_window7_224")

Importing this file imports neither torch, MONAI nor segmentation_models_pytorch.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from factory.predictors.backbones import (
    Architecture,
    check_present,
    check_weights,
    encoder_arguments,
    keeps_statistics,
)
from schemas.identity import execution_field

if TYPE_CHECKING:
    from torch import nn

BY_WIDTH = ("unet", "unetplusplus", "attention_unet", "dynunet", "resunet")
"""Architectures that are given by their width, and need no encoder."""
BY_ENCODER = {
    "unet": "Unet",
    "unetplusplus": "UnetPlusPlus",
    "deeplabv3plus": "DeepLabV3Plus",
    "upernet": "UPerNet",
}
"""Architectures on an encoder, by their class in segmentation_models_pytorch."""
DIVISORS = {"unet": 16, "unetplusplus": 16, "attention_unet": 16, "resunet": 16}
"""What the side must be a multiple of, for a network by width."""
ENCODER_DIVISOR = 32


@dataclass(frozen=True, kw_only=True)
class Segmenter:
    """A network with one logit per pixel, lesion or not.

    Attributes:
        architecture: by width (`encoder` None): "unet" (Falk et al. 2019), "unetplusplus" (Zhou et al. 2018),
            "attention_unet" (Oktay et al. 2018), "resunet" (residual units: Kerfoot et al. 2019), "dynunet"
            (nnU-Net's network: Isensee et al. 2021). On an encoder: "unet", "unetplusplus", "deeplabv3plus", "upernet".
        encoder: `name[?option=value&…]` of a timm network, Swin among them (not for deeplabv3plus, which dilates).
        width: channels of the first level of a network by width.
        weights: local safetensors file of the encoder in timm's layout; random without. Where it lies does not enter
            the identity.
        frozen_statistics: batch normalisation of the encoder keeps the statistics of its weights. By default just where
            the normalisation was folded into the convolutions.
        weights_digest: of the bytes of `weights`; found from the file.
    """

    architecture: str = "unet"
    encoder: str | None = None
    width: int = 16
    weights: str | None = execution_field(None)
    frozen_statistics: bool | None = None
    weights_digest: str | None = None

    def __post_init__(self) -> None:
        if self.encoder is None and self.architecture not in BY_WIDTH:
            known = self.architecture in BY_ENCODER
            wish = (
                'an encoder such as "resnet18"' if known else f"one of {', '.join({*BY_WIDTH, *BY_ENCODER})}"
            )
            raise ValueError(f"Segmenter.architecture: {self.architecture!r} needs {wish}")
        if self.encoder is not None and self.architecture not in BY_ENCODER:
            raise ValueError(
                f"Segmenter.encoder: {self.architecture!r} takes none; want one of {', '.join(BY_ENCODER)}, "
                f"got {self.encoder!r}"
            )
        if self.encoder is not None:
            Architecture.parse(self.encoder, "Segmenter.encoder")
        if not 1 <= self.width <= 512:
            raise ValueError(f"Segmenter.width: want 1 … 512, got {self.width}")
        if self.weights is not None and self.encoder is None:
            raise ValueError(f"Segmenter.weights: {self.weights} is for an encoder, and there is none")
        digest = check_weights(self.weights, self.weights_digest, "Segmenter")
        object.__setattr__(self, "weights_digest", digest)
        object.__setattr__(self, "frozen_statistics", keeps_statistics(self.weights, self.frozen_statistics))

    @property
    def task(self) -> Literal["segmentation"]:
        """What the outputs mean: one logit per pixel."""
        return "segmentation"

    def build(self, num_classes: int, channels: int, size: int) -> "nn.Module":
        """The network with its starting weights: float32 pixels (B, K, S, S) in 0 … 1 → logits (B, 1, S, S).

        Args:
            num_classes: of the examples; takes no effect, as the mask has one kind of lesion.
            channels: K.
            size: S.

        Raises:
            ValueError: the network cannot be built at this size, or the weights do not fit.
        """
        check_present(self.weights, self.weights_digest, "Segmenter")
        return self._network(channels, size, self.weights)

    def skeleton(self, num_classes: int, channels: int, size: int) -> "nn.Module":
        """The same network before any weights are loaded: for putting trained tensors into."""
        return self._network(channels, size, None)

    def _network(self, channels: int, size: int, weights: str | None) -> "nn.Module":
        from factory.predictors.networks import Normalised

        divisor = (
            ENCODER_DIVISOR if self.encoder else DIVISORS.get(self.architecture, 2 ** num_halvings(size))
        )
        if size % divisor:
            raise ValueError(
                f"Segmenter: {self.architecture} takes sizes that are multiples of {divisor} px, got {size}"
            )
        if self.encoder is None:
            body = _by_width(self.architecture, self.width, channels, size)
            return Normalised(body, [0.5] * channels, [0.25] * channels)
        import segmentation_models_pytorch as smp

        encoder = Architecture.parse(self.encoder, "Segmenter.encoder")
        arguments = encoder_arguments(encoder, weights, size)
        try:
            body = getattr(smp, BY_ENCODER[self.architecture])(in_channels=3, classes=1, **arguments)
        except (TypeError, RuntimeError, ValueError, AssertionError) as error:
            raise ValueError(f"Segmenter: {self.architecture} on {self.encoder}: {error}") from error
        kept = body.encoder if self.frozen_statistics else None
        return Normalised(body, *encoder.normalisation(), statistics_of=kept)


def num_halvings(size: int) -> int:
    """Levels below the first of nnU-Net's network: halve while the side is at least 8 px, at most seven times."""
    count = 0
    while size >= 8 and size % 2 == 0 and count < 7:
        size //= 2
        count += 1
    return count


def _by_width(architecture: str, width: int, channels: int, size: int) -> "nn.Module":
    """A two-dimensional MONAI network, (B, channels, S, S) → (B, 1, S, S)."""
    from monai.networks import nets
    from torch import nn

    from factory.predictors.networks import LastOutput

    plane: dict[str, Any] = {"spatial_dims": 2, "in_channels": channels, "out_channels": 1}
    doubling = [width * 2**level for level in range(5)]
    features = (width, width, 2 * width, 4 * width, 8 * width, width)
    match architecture:
        case "unet":
            return nets.BasicUNet(**plane, features=features, norm=("batch", {"affine": True}))
        case "unetplusplus":
            norm = ("batch", {"affine": True})
            network = nets.BasicUNetPlusPlus(**plane, features=features, norm=norm)
            for unused in ("final_conv_0_1", "final_conv_0_2", "final_conv_0_3"):
                setattr(network, unused, nn.Identity())  # heads of deep supervision
            return LastOutput(network)
        case "attention_unet":
            return nets.AttentionUnet(**plane, channels=doubling, strides=[2] * 4)
        case "resunet":
            return nets.UNet(**plane, channels=doubling, strides=[2] * 4, num_res_units=2, norm="batch")
    assert architecture == "dynunet", architecture
    levels = num_halvings(size)
    if levels < 2:
        raise ValueError(f"Segmenter: dynunet wants a side that can be halved twice down to 4 px, got {size}")
    strides = [1] + [2] * levels
    return nets.DynUNet(
        **plane,
        kernel_size=[3] * (levels + 1),
        strides=strides,
        upsample_kernel_size=strides[1:],
        filters=[min(512, width * 2**level) for level in range(levels + 1)],
    )
