"""Published networks by name (timm) with weights from local files, and what they expect of their input.

An architecture is a timm name with options of its constructor, for example

    resnet50        mobilenetv2_100?pad_type=same&mean=0.5&std=0.5        vit_small_patch16_224

`mean` and `std` are the input normalisation that the weights expect; timm's declared values without. Published networks
always see three channels: a grey image is repeated, so that the network is the published one. Networks with a fixed
input size (ViT, Swin) are built for the size of the examples, their position tables interpolated. Weights are never
fetched: a local safetensors file, or random ones.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from schemas.identity import digest_file

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A parsed architecture.

    Attributes:
        name: timm's, or one of ours.
        options: further arguments of its constructor.
        mean, std: of the normalisation of pixels in 0 … 1; None for the declared values.
    """

    name: str
    options: dict[str, Any]
    mean: float | None = None
    std: float | None = None

    @classmethod
    def parse(cls, text: str, field: str) -> "Architecture":
        """`name[?option=value&…]`.

        Raises:
            ValueError: naming `field`.
        """
        name, _, query = text.partition("?")
        if not name or ":" in name or "/" in name:
            raise ValueError(f"{field}: want a timm name such as resnet50, got {text!r}")
        options: dict[str, Any] = {key: _number(value) for key, value in parse_qsl(query)}
        mean, std = options.pop("mean", None), options.pop("std", None)
        if std is not None and not std > 0:
            raise ValueError(f"{field}: std must be positive, got {text!r}")
        return cls(name=name, options=options, mean=mean, std=std)

    def timm_options(self, size: int) -> dict[str, Any]:
        """Arguments of `timm.create_model`, with img_size where the network has a fixed input size.

        Raises:
            ValueError: timm has no network of this name.
        """
        import timm

        if not timm.is_model(self.name):
            near = difflib.get_close_matches(self.name, timm.list_models(), 3)
            raise ValueError(
                f"architecture {self.name!r}: timm has no such network; near: {', '.join(near) or 'none'}"
            )
        options = dict(self.options)
        config = timm.get_pretrained_cfg(self.name)
        if config is not None and config.fixed_input_size:
            options.setdefault("img_size", size)
        return options

    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std) of each of three channels."""
        import timm

        config = timm.get_pretrained_cfg(self.name)
        assert config is not None, self.name
        mean = config.mean if self.mean is None else (self.mean,) * 3
        std = config.std if self.std is None else (self.std,) * 3
        return tuple(float(v) for v in mean), tuple(float(v) for v in std)


def check_weights(weights: str | None, digest: str | None, owner: str) -> str | None:
    """Digest of the weights' bytes, None without weights; what a component records of them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, or its digest is not the one given.
    """
    if weights is None:
        return digest
    if not weights.endswith(".safetensors"):
        raise ValueError(f"{owner}.weights: only .safetensors files are read, never pickles; got {weights}")
    if not Path(weights).is_file():
        raise FileNotFoundError(f"{owner}.weights: no file {weights}")
    found = digest_file(Path(weights))
    if digest is not None and digest != found:
        raise ValueError(
            f"{owner}.weights: {weights} has digest {found}, want {digest}; give the right file, or no weights_digest"
        )
    return found


def keeps_statistics(weights: str | None, wanted: bool | None) -> bool:
    """Whether batch normalisation must keep its statistics while the network learns.

    Where the normalisation was folded into the convolutions (mean 0, variance 1 and an offset), the weights never were
    normalised by the statistics of a batch; training by such statistics destroys them.

    Args:
        weights: safetensors file that `check_weights` accepted, or None.
        wanted: what the user asked for; None leaves it to the weights.

    Raises:
        ValueError: not a readable safetensors file.
    """
    if wanted is not None or weights is None:
        return bool(wanted)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="pt") as file:
            held = set(file.keys())
            norms = [name.removesuffix(".running_mean") for name in held if name.endswith(".running_mean")]
            means = (file.get_tensor(f"{norm}.running_mean") for norm in norms)
            variances = (file.get_tensor(f"{norm}.running_var") for norm in norms)
            folded = not any(mean.any() for mean in means) and all((one == 1).all() for one in variances)
            offsets = (file.get_tensor(f"{norm}.bias") for norm in norms if f"{norm}.bias" in held)
            return bool(norms) and folded and any(bool(offset.any()) for offset in offsets)
    except SafetensorError as error:
        raise ValueError(f"weights {weights}: not a readable safetensors file: {error}") from error


def check_present(weights: str | None, digest: str | None, owner: str) -> None:
    """Refuse to build from random numbers what was declared to start from weights.

    Raises:
        ValueError: only the digest is known.
    """
    if weights is None and digest is not None:
        raise ValueError(f"{owner}.weights: give the file with digest {digest} to train from it again")


def classification_network(
    architecture: Architecture, weights: str | None, *, num_classes: int, size: int, dropout: float
) -> "nn.Module":
    """A timm classifier with a new head, float32 (B, 3, S, S) → (B, num_classes); 0 classes gives pooled features.

    Raises:
        ValueError: an option the network does not take, or weights that do not fit it.
    """
    import timm

    options = architecture.timm_options(size)
    if dropout:
        options["drop_rate"] = dropout
    if weights is None:
        network = _created(architecture, num_classes=num_classes, pretrained=False, **options)
        _check_patches(network, architecture, size)
        return network
    classes = _head_rows(architecture, weights)
    overlay = {"file": weights, "num_classes": classes}
    # The number of classes that the file holds: with any other, timm would not notice missing tensors.
    try:
        network = timm.create_model(
            architecture.name,
            pretrained=True,
            num_classes=classes,
            pretrained_cfg_overlay=overlay,
            **options,
        )
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"weights {weights} do not fit {architecture.name} at {size} px: {error}") from error
    _check_patches(network, architecture, size)
    network.reset_classifier(num_classes)
    return network


def encoder_arguments(architecture: Architecture, weights: str | None, size: int) -> dict[str, Any]:
    """Arguments by which segmentation_models_pytorch builds a timm encoder with these weights.

    Raises:
        ValueError: weights that do not fit the network.
    """
    arguments = architecture.timm_options(size)
    if weights is None:
        return {"encoder_name": f"tu-{architecture.name}", "encoder_weights": None, **arguments}
    # A features-only network is never loaded strictly; the whole network with the same names is.
    classification_network(architecture, weights, num_classes=0, size=size, dropout=0.0)
    overlay = {"file": weights}
    return {
        "encoder_name": f"tu-{architecture.name}",
        "encoder_weights": True,
        "pretrained_cfg_overlay": overlay,
        **arguments,
    }


def _created(architecture: Architecture, **arguments: Any) -> "nn.Module":
    import timm

    try:
        return timm.create_model(architecture.name, **arguments)
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"architecture {architecture.name}: cannot be built: {error}") from error


def _check_patches(network: "nn.Module", architecture: Architecture, size: int) -> None:
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", (1, 1))
    if size % patch[0] or size % patch[1]:
        raise ValueError(
            f"architecture {architecture.name}: takes sizes that are multiples of {patch[0]} px, got {size}"
        )


def _head_rows(architecture: Architecture, weights: str) -> int:
    """Classes of the head in a weights file, 0 where it has none."""
    import timm
    from safetensors import SafetensorError, safe_open

    config = timm.get_pretrained_cfg(architecture.name)
    assert config is not None, architecture.name
    names = (config.classifier,) if isinstance(config.classifier, str) else config.classifier or ()
    try:
        with safe_open(weights, framework="pt") as file:
            held = set(file.keys())
            for name in names:
                if f"{name}.weight" in held:
                    return int(file.get_slice(f"{name}.weight").get_shape()[0])
    except SafetensorError as error:
        raise ValueError(f"weights {weights}: not a readable safetensors file: {error}") from error
    return 0


def _number(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
