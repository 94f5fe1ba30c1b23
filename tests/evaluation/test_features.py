"""Features and distances against torchmetrics on the same features, and the published networks' arithmetic."""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchmetrics.functional.image.lpips import _LPIPS
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from torchvision.models import alexnet, inception_v3, vgg16

from factory.evaluation.features import LoadedInception, describe, parse_features
from factory.evaluation.image_metrics import frechet_distance, kernel_distance
from factory.evaluation.lpips import Lpips


class Given(nn.Module):
    """A feature extractor that hands on what it is given, in the form torchmetrics asks for."""

    num_features = 12

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


@pytest.fixture(scope="module")
def feature_pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(0, 1, (60, 12)), rng.normal(0.3, 1.4, (50, 12))


def test_fid_equals_torchmetrics_on_the_same_features(feature_pair: tuple[np.ndarray, np.ndarray]) -> None:
    real, synthetic = feature_pair
    metric = FrechetInceptionDistance(feature=Given(), input_img_size=(12, 1, 1)).double()
    metric.set_dtype(torch.float64)
    for values, is_real in ((real, True), (synthetic, False)):
        metric.update(torch.from_numpy(values)[:, :, None, None], real=is_real)
    assert frechet_distance(real, synthetic) == pytest.approx(float(metric.compute()), rel=1e-6)


def test_kid_equals_torchmetrics_on_the_same_features(feature_pair: tuple[np.ndarray, np.ndarray]) -> None:
    real, synthetic = feature_pair[0][:50], feature_pair[1]
    metric = KernelInceptionDistance(feature=Given(), subsets=1, subset_size=50)
    for values, is_real in ((real, True), (synthetic, False)):
        metric.update(torch.from_numpy(values)[:, :, None, None], real=is_real)
    mean, _ = metric.compute()
    assert kernel_distance(real, synthetic) == pytest.approx(float(mean), rel=1e-5)


@pytest.mark.parametrize(("name", "net", "side"), [("alexnet", "alex", 80), ("vgg16", "vgg", 48)])
def test_lpips_is_the_published_arithmetic(
    name: str, net: Literal["alex", "vgg"], side: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = {"alexnet": alexnet, "vgg16": vgg16}[name](weights=None)
    reference = _LPIPS(pretrained=True, net=net, pnet_rand=True)
    # Our random backbone in the reference's slices, which keep torchvision's numbering.
    for part in (
        reference.net.slice1,
        reference.net.slice2,
        reference.net.slice3,
        reference.net.slice4,
        reference.net.slice5,
    ):
        for number, layer in part.named_children():
            layer.load_state_dict(model.features[int(number)].state_dict())
    backbone, linear = tmp_path / "backbone.safetensors", tmp_path / "linear.safetensors"
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items() if k.startswith("features.")}, backbone
    )
    save_file(
        {k: v for k, v in reference.state_dict().items() if k.startswith("lin") and k[3].isdigit()}, linear
    )
    lpips = Lpips(backbone=str(backbone), linear=str(linear)).load()
    assert lpips.name == name
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, (side, side, 3), np.uint8), rng.integers(0, 256, (side, side), np.uint8)]

    def tensor(image: np.ndarray) -> torch.Tensor:
        rgb = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
        return torch.from_numpy(rgb).permute(2, 0, 1)[None].float() / 127.5 - 1

    expected = float(reference(tensor(images[0]), tensor(images[1])))
    assert expected > 1e-4
    assert lpips.distance(*images) == pytest.approx(expected, rel=1e-3)
    matrix = lpips.matrix(images)
    assert matrix[0, 1] == matrix[1, 0] == pytest.approx(expected, rel=1e-3) and matrix[0, 0] == 0
    with pytest.raises(ValueError, match="too small"):
        lpips.distance(images[0][:8, :8], images[1][:8, :8])


def test_lpips_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    backbone, linear = tmp_path / "vgg.safetensors", tmp_path / "alex.safetensors"
    save_file({"features.0.weight": torch.zeros(64, 3, 7, 7)}, backbone)
    with pytest.raises(ValueError, match="want torchvision's vgg16 or alexnet"):
        Lpips(backbone=str(backbone), linear=str(linear)).load()
    network = alexnet(weights=None)
    save_file({k: v for k, v in network.state_dict().items() if k.startswith("features.")}, backbone)
    save_file({f"lin{k}.model.1.weight": torch.zeros(1, 64, 1, 1) for k in range(5)}, linear)
    with pytest.raises(ValueError, match="lin1"):
        Lpips(backbone=str(backbone), linear=str(linear)).load()


def test_a_pickle_with_code_is_not_read(tmp_path: Path) -> None:
    import pickle

    class Harm:
        def __reduce__(self) -> tuple:
            return (open, (str(tmp_path / "harm"), "w"))

    path = tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps({"fc.weight": Harm()}))
    with pytest.raises(ValueError, match="weights.pth"):
        parse_features(f"inception={path}").load()
    assert not (tmp_path / "harm").exists()


@pytest.fixture(scope="module")
def inception_files(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """One set of random weights with both heads: 1000 classes (torchvision), 1008 (of 2015)."""
    torch.manual_seed(0)
    network = inception_v3(weights=None, aux_logits=False, init_weights=False)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):  # variance-preserving, or all features vanish
                nn.init.kaiming_normal_(module.weight)
    folder, files = tmp_path_factory.mktemp("inception"), {}
    for classes in (1000, 1008):
        state = dict(network.state_dict()) | {
            "fc.weight": torch.zeros(classes, 2048),
            "fc.bias": torch.zeros(classes),
        }
        files[classes] = folder / f"{classes}.safetensors"
        save_file({name: value.contiguous() for name, value in state.items()}, files[classes])
    return files


def test_inception_features_are_torchvisions_pooled_ones(inception_files: dict[int, Path]) -> None:
    loaded = parse_features(f"inception={inception_files[1000]}").load()
    assert isinstance(loaded, LoadedInception) and loaded.spec.name == "inception:torchvision"
    image = np.random.default_rng(0).integers(0, 256, (299, 299, 3), np.uint8)
    network = inception_v3(weights=None, aux_logits=False, init_weights=False)
    from safetensors.torch import load_file

    network.load_state_dict(load_file(inception_files[1000]))
    network.fc = nn.Identity()
    with torch.inference_mode():
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
        expected = network.eval()((pixels - 0.5) / 0.5).numpy()
    found = loaded.embed([image])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert "as pooled" in describe(loaded.spec)
    of_2015 = parse_features(f"inception={inception_files[1008]}").load()
    assert of_2015.spec.name == "inception:fid-2015"
    other = of_2015.embed([image])
    assert np.abs(other - found).max() > 1e-3 * np.abs(found).max(), "pooling at the borders differs"


def test_features_that_cannot_be_had_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inception=FILE"):
        parse_features("inception")
    with pytest.raises(FileNotFoundError, match="no such file"):
        parse_features(f"inception={tmp_path / 'nothing.pth'}")
    with pytest.raises(ValueError, match="want tiny"):
        parse_features("clip")
    other = tmp_path / "other.safetensors"
    save_file({"fc.weight": torch.zeros(10, 2048)}, other)
    with pytest.raises(ValueError, match="its head has 10"):
        parse_features(f"inception={other}").load()
