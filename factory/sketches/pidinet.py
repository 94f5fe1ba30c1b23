"""PiDiNet (Su et al. 2021, arXiv 2108.07009): edges by convolutions over differences of pixels.

Written from the paper, §3.1 and Fig. 2-5. A pixel difference convolution is linear in its weights, so each becomes a
plain convolution when weights are read. Names of parameters are those of the published checkpoints
(`{"state_dict": {"module.init_block.weight": …}}`), whose variant "carv4" alternates central, angular and radial
differences with plain convolutions; width, dilation and attention modules follow from the shapes in the file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["central", "angular", "radial", "plain"]
_KINDS: tuple[Kind, ...] = ("central", "angular", "radial", "plain")
_STAGES = (3, 4, 4, 4)
_NEXT_CLOCKWISE = (3, 0, 1, 6, 4, 2, 7, 8, 5)
_OUTER_RING = (0, 2, 4, 10, 14, 20, 22, 24)
_INNER_RING = (6, 7, 8, 11, 13, 16, 17, 18)


def as_plain_convolution(weights: Tensor, kind: Kind) -> Tensor:
    """Weights (O, I, 3, 3) of a difference convolution as those of a plain one, (O, I, 3, 3) or radial (O, I, 5, 5).

    Eq. 2-4: central differences Σ w_i (x_i − x_c); angular Σ w_i (x_i − x_i'), i' the next neighbour clockwise;
    radial Σ w_i (x_i − x_i'), x_i on the ring of radius 2 and x_i' on that of radius 1 in the same direction.
    """
    flat = weights.flatten(2)
    if kind == "central":
        centred = flat.clone()
        centred[:, :, 4] -= flat.sum(dim=2)
        return centred.view_as(weights)
    if kind == "angular":
        return (flat - flat[:, :, _NEXT_CLOCKWISE]).view_as(weights)
    if kind == "radial":
        wide = flat.new_zeros(*flat.shape[:2], 25)
        wide[:, :, _OUTER_RING] = flat[:, :, 1:]
        wide[:, :, _INNER_RING] = -flat[:, :, 1:]
        return wide.view(*flat.shape[:2], 5, 5)
    return weights


class DifferenceBlock(nn.Module):
    """Depthwise difference convolution, ReLU, 1×1 convolution, and a shortcut; halves the image where asked to."""

    def __init__(self, inside: int, outside: int, kind: Kind, halve: bool) -> None:
        super().__init__()
        size = 5 if kind == "radial" else 3
        self.conv1 = nn.Conv2d(inside, inside, size, padding=size // 2, groups=inside, bias=False)
        self.conv2 = nn.Conv2d(inside, outside, 1, bias=False)
        self.shortcut = nn.Conv2d(inside, outside, 1) if halve else None

    def forward(self, x: Tensor) -> Tensor:
        if self.shortcut is None:
            return self.conv2(self.conv1(x).relu()) + x
        x = nn.functional.max_pool2d(x, 2)
        return self.conv2(self.conv1(x).relu()) + self.shortcut(x)


class Dilations(nn.Module):
    """Compact dilation module: four dilated convolutions, summed."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 1)
        for number, rate in enumerate((5, 7, 9, 11), start=1):
            conv = nn.Conv2d(outside, outside, 3, dilation=rate, padding=rate, bias=False)
            self.add_module(f"conv2_{number}", conv)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x.relu())
        return torch.stack([self.get_submodule(f"conv2_{number}")(x) for number in range(1, 5)]).sum(dim=0)


class SpatialAttention(nn.Module):
    """Compact spatial attention module: one weight per place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4, 1)
        self.conv2 = nn.Conv2d(4, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv2(self.conv1(x.relu())).sigmoid()


class _Reduce(nn.Module):
    """One map of many."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class PiDiNetwork(nn.Module):
    """The network: images (B, 3, H, W), normalised as ImageNet → probability of an edge (B, 1, H, W).

    Args:
        width: channels of the first stage; 60, 30 and 20 are published.
        dilation: channels of the dilation modules, or None without them.
        attention: whether there are attention modules.
    """

    def __init__(self, width: int, dilation: int | None, attention: bool) -> None:
        super().__init__()
        self.init_block = nn.Conv2d(3, width, 3, padding=1, bias=False)
        widths = (width, 2 * width, 4 * width, 4 * width)
        inside = width
        for stage, (outside, blocks) in enumerate(zip(widths, _STAGES), start=1):
            for number in range(1, blocks + 1):
                halve = stage > 1 and number == 1
                block = DifferenceBlock(inside, outside, kind_of(stage, number), halve)
                self.add_module(f"block{stage}_{number}", block)
                inside = outside
        seen = [dilation or channels for channels in widths]
        self.dilations = nn.ModuleList(Dilations(w, dilation) for w in widths if dilation)
        self.attentions = nn.ModuleList(SpatialAttention(channels) for channels in seen if attention)
        self.conv_reduces = nn.ModuleList(_Reduce(channels) for channels in seen)
        self.classifier = nn.Conv2d(4, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        x, maps = self.init_block(images), []
        for stage, blocks in enumerate(_STAGES, start=1):
            for number in range(1, blocks + 1):
                x = self.get_submodule(f"block{stage}_{number}")(x)
            y = self.dilations[stage - 1](x) if len(self.dilations) else x
            y = self.attentions[stage - 1](y) if len(self.attentions) else y
            y = self.conv_reduces[stage - 1](y)
            maps.append(nn.functional.interpolate(y, images.shape[2:], mode="bilinear", align_corners=False))
        return self.classifier(torch.cat(maps, dim=1)).sigmoid()


def kind_of(stage: int, number: int) -> Kind:
    """Which differences block `number` of `stage` takes, both from 1: the variant "carv4"; the first layer is central."""
    return _KINDS[number % 4] if stage == 1 else _KINDS[number - 1]


def load_pidinet(path: Path) -> PiDiNetwork:
    """The network with the weights of a checkpoint, difference convolutions turned into plain ones; in evaluation mode.

    Raises:
        ValueError: the file is of another layout; names the first key that is wrong.
    """
    state = _read_state(path)
    first, dilated = state.get("init_block.weight"), state.get("dilations.0.conv1.weight")
    if first is None or first.shape[1:] != (3, 3, 3):
        raise ValueError(f"{path}: no PiDiNet checkpoint (want init_block.weight of shape (C, 3, 3, 3))")
    model = PiDiNetwork(
        width=first.shape[0],
        dilation=None if dilated is None else dilated.shape[0],
        attention="attentions.0.conv1.weight" in state,
    )
    plain = dict(state)
    plain["init_block.weight"] = as_plain_convolution(first, "central")
    for stage, blocks in enumerate(_STAGES, start=1):
        for number in range(1, blocks + 1):
            name = f"block{stage}_{number}.conv1.weight"
            if name in plain:
                plain[name] = as_plain_convolution(plain[name], kind_of(stage, number))
    wanted = model.state_dict()
    for name in sorted(wanted.keys() | plain.keys()):
        found, shape = plain.get(name), wanted[name].shape if name in wanted else None
        if found is None or found.shape != shape:
            raise ValueError(
                f"{path}: {name} is {None if found is None else tuple(found.shape)} in the file and "
                f"{None if shape is None else tuple(shape)} in a PiDiNet (carv4) of width {first.shape[0]}"
            )
    model.load_state_dict(plain)
    return model.eval().requires_grad_(False)


def _read_state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state: Mapping[str, Tensor] = load_file(path)
    else:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        state = loaded.get("state_dict", loaded)
    return {name.removeprefix("module."): value.float() for name, value in state.items()}
