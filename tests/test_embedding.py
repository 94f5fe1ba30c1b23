"""Embedders: preprocessing, identity of what was used, errors, and what the shipped one can tell apart."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from factory.datasets.phantom import PhantomConfig, phantom_sample
from factory.embedding import SHIPPED, EmbedderSpec, ImageEmbedder, LoadedEmbedder
from factory.imaging import letterbox

MOBILENET = "timm:mobilenetv2_100?pad_type=same&mean=0.5&std=0.5"


def phantoms(count: int, seed: int) -> list[np.ndarray]:
    return [phantom_sample(PhantomConfig(), seed, index).image for index in range(count)]


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def tiny() -> LoadedEmbedder:
    return ImageEmbedder().load(num_threads=1)


def write_dinov2(folder: Path, seed: int = 0, **changes: object) -> Path:
    """A real Dinov2Model of tiny width with random weights, as transformers saves it."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(seed)
    sizes = {"image_size": 28, "patch_size": 14, "hidden_size": 24, "num_hidden_layers": 2}
    Dinov2Model(Dinov2Config(**sizes, num_attention_heads=2)).save_pretrained(folder)
    processor = {"crop_size": {"height": 28, "width": 28}, "size": {"shortest_edge": 32},
                 "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | changes))
    return folder


def test_import_leaves_the_heavy_libraries_out() -> None:
    code = (
        "import sys, factory.embedding; sys.exit(bool({'torch', 'timm', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------------------ the shipped one


def test_shipped_weights_are_small_safetensors(tiny: LoadedEmbedder) -> None:
    files = {path.name for path in SHIPPED.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} <= files
    assert not {name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))}
    assert (SHIPPED / "model.safetensors").stat().st_size < 3_000_000
    assert tiny.spec.dim <= 128


def test_embeddings_are_unit_norm_and_do_not_depend_on_the_batch(tiny: LoadedEmbedder) -> None:
    images = phantoms(37, seed=11)
    together = tiny.embed(images)
    assert together.dtype == np.float32 and together.shape == (37, tiny.spec.dim)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    alone = np.concatenate([tiny.embed([image]) for image in images[:3] + images[-3:]])
    np.testing.assert_allclose(alone, together[[0, 1, 2, 34, 35, 36]], atol=2e-5)
    assert (tiny.embed(images) == together).all()
    assert tiny.embed([]).shape == (0, tiny.spec.dim)


def test_grey_is_replicated_and_frames_are_letterboxed(tiny: LoadedEmbedder) -> None:
    image = phantoms(1, seed=12)[0]
    wide = image[:80]
    grey, colour, square = tiny.embed(
        [wide, np.repeat(wide[:, :, None], 3, axis=2), letterbox(wide, tiny.spec.size)]
    )
    np.testing.assert_allclose(grey, colour, atol=1e-5)
    np.testing.assert_allclose(grey, square, atol=1e-5)


def test_images_that_are_not_uint8_are_refused(tiny: LoadedEmbedder) -> None:
    with pytest.raises(ValueError, match="uint8"):
        tiny.embed([np.zeros((8, 8), np.uint16)])


def _jpeg(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=50)
    return np.asarray(Image.open(buffer))


def _shift(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    dy, dx = rng.integers(-6, 7, 2)
    return np.asarray(ndimage.shift(image, (dy, dx), order=0, mode="nearest"))


def _crop(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    side = round(0.9 * image.shape[0])
    top, left = rng.integers(0, image.shape[0] - side + 1, 2)
    window = Image.fromarray(image[top : top + side, left : left + side])
    return np.asarray(window.resize(image.shape[::-1], Image.Resampling.BICUBIC))


COPIES: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "brightness": lambda image, rng: np.clip(
        rng.uniform(0.75, 1.3) * image + rng.uniform(-15, 15), 0, 255
    ).astype(np.uint8),
    "jpeg": _jpeg,
    "shift": _shift,
    "crop": _crop,
    "mirror": lambda image, rng: image[:, ::-1].copy(),
    "speckle": lambda image, rng: np.clip(
        image * (1 + 0.15 * rng.standard_normal(image.shape)), 0, 255
    ).astype(np.uint8),
    "blur": lambda image, rng: ndimage.gaussian_filter(image, 1.2),
}


def recall_at_1(embedder: LoadedEmbedder, images: list[np.ndarray]) -> dict[str, float]:
    """Share of changed copies whose nearest image is their original, per kind of change."""
    rng = np.random.default_rng(0)
    originals = embedder.embed(images)
    found = {}
    for kind, change in COPIES.items():
        similarity = embedder.embed([change(image, rng) for image in images]) @ originals.T
        found[kind] = float((similarity.argmax(axis=1) == np.arange(len(images))).mean())
    return found


def test_shipped_embedder_ranks_copies_above_other_images(tiny: LoadedEmbedder, tmp_path: Path) -> None:
    """On phantoms that it never saw; the untrained network, of the same seed, is far worse."""
    from factory.assets.train_embedder import EmbedderTraining, build_model, save

    images = phantoms(150, seed=987)
    settings = EmbedderTraining()
    save(build_model(settings), settings, tmp_path)
    trained = recall_at_1(tiny, images)
    untrained = recall_at_1(ImageEmbedder(name=f"dinov2:{tmp_path}").load(num_threads=1), images)
    assert np.mean(list(trained.values())) >= 0.95, trained
    assert min(trained.values()) >= 0.85, trained
    assert np.mean(list(untrained.values())) <= np.mean(list(trained.values())) - 0.2, untrained


# ------------------------------------------------------------------------------------------ identity


def test_spec_travels_as_json(tiny: LoadedEmbedder) -> None:
    spec = EmbedderSpec.from_json(tiny.spec.to_json())
    assert spec == tiny.spec
    assert spec.embedder() == ImageEmbedder(name="tiny")
    spec.check_same(tiny.spec, "table")


def test_spec_names_both_embedders_where_they_differ(tiny: LoadedEmbedder, tmp_path: Path) -> None:
    other = ImageEmbedder(name=f"dinov2:{write_dinov2(tmp_path)}").load(num_threads=1)
    with pytest.raises(ValueError, match=f"syn.lance: embedder dinov2:{tmp_path}.* tiny "):
        tiny.spec.check_same(other.spec, "syn.lance")


def test_digest_follows_the_bytes_of_the_weights(tmp_path: Path) -> None:
    digests = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder = write_dinov2(tmp_path / name, seed)
        digests.append(ImageEmbedder(name=f"dinov2:{folder}").load(num_threads=1).spec.weights_digest)
    assert digests[0] == digests[1] != digests[2]


# ------------------------------------------------------------------------------------------ dinov2, timm


def test_local_dinov2_uses_its_own_preprocessing(tmp_path: Path) -> None:
    import torch
    from transformers import Dinov2Model

    folder = write_dinov2(tmp_path)
    embedder = ImageEmbedder(name=f"dinov2:{folder}").load(num_threads=1)
    assert (embedder.spec.size, embedder.spec.dim, embedder.spec.mean) == (28, 24, (0.4, 0.5, 0.6))
    image = np.random.default_rng(0).integers(0, 256, (28, 28, 3), np.uint8)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255 - torch.tensor([0.4, 0.5, 0.6]).view(
        3, 1, 1
    )
    pixels = pixels / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    with torch.no_grad():
        wanted = Dinov2Model.from_pretrained(folder)(pixels).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(embedder.embed([image]), unit(wanted), atol=1e-5)


def test_mobilenet_needs_its_padding_and_normalisation(mobilenet_weights: Path) -> None:
    import timm
    import torch

    images = phantoms(4, seed=1)
    embedder = ImageEmbedder(name=MOBILENET, weights=str(mobilenet_weights)).load(num_threads=1)
    assert (embedder.spec.dim, embedder.spec.size) == (1280, 224)
    model = timm.create_model(
        "mobilenetv2_100", pretrained=False, pad_type="same", checkpoint_path=str(mobilenet_weights)
    ).eval()
    pixels = np.stack([np.repeat(letterbox(image, 224)[None], 3, axis=0) for image in images])
    with torch.no_grad():
        features = model.forward_features(torch.from_numpy(pixels).float() / 127.5 - 1)
        wanted = model.forward_head(features, pre_logits=True).numpy()
    found = embedder.embed(images)
    np.testing.assert_allclose(found, unit(wanted), atol=1e-4)
    for name in ("timm:mobilenetv2_100", "timm:mobilenetv2_100?pad_type=same"):
        careless = ImageEmbedder(name=name, weights=str(mobilenet_weights)).load(num_threads=1)
        assert ((careless.embed(images) * found).sum(axis=1) < 0.97).any(), name
        with pytest.raises(ValueError, match="does not compare"):
            embedder.spec.check_same(careless.spec, "table")


def test_weights_elsewhere_are_the_same_embedder(mobilenet_weights: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(mobilenet_weights.read_bytes())
    first = ImageEmbedder(name=MOBILENET, weights=str(mobilenet_weights)).load(num_threads=1)
    second = ImageEmbedder(name=MOBILENET, weights=str(copy)).load(num_threads=1)
    first.spec.check_same(second.spec, "table")
    assert second.spec.embedder().weights == str(copy)


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("name", ["", "dino", "dinov2:", "timm", "tiny:large"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"want tiny, dinov2:<hub id or folder> or timm:<model>"):
        ImageEmbedder(name=name)


def test_only_safetensors_are_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="safetensors"):
        ImageEmbedder(name="timm:resnet18", weights="model.pth")
    with pytest.raises(ValueError, match="timm models only"):
        ImageEmbedder(name="tiny", weights="model.safetensors")
    folder = write_dinov2(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="only safetensors"):
        ImageEmbedder(name=f"dinov2:{folder}").load()


@pytest.mark.parametrize("name", ["dinov2:facebook/dinov2-small", "dinov2:no/such/folder", "timm:resnet18"])
def test_unreachable_hub_says_what_ships(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="--embedder tiny, which ships with the factory"):
        ImageEmbedder(name=name).load()


def test_incomplete_weights_are_refused_not_filled_at_random(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = write_dinov2(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    dropped = sorted(name for name in tensors if "layer.1" in name)[0]
    del tensors[dropped]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks"):
        ImageEmbedder(name=f"dinov2:{folder}").load()


def test_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = write_dinov2(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "vit"}))
    with pytest.raises(ValueError, match="'vit' model, want dinov2"):
        ImageEmbedder(name=f"dinov2:{folder}").load()


def test_timm_mistakes_are_named(mobilenet_weights: Path, tmp_path: Path) -> None:
    weights = str(mobilenet_weights)
    with pytest.raises(ValueError, match="no model 'mobilnet_v2'"):
        ImageEmbedder(name="timm:mobilnet_v2", weights=weights).load()
    with pytest.raises(ValueError, match="do not fit resnet18"):
        ImageEmbedder(name="timm:resnet18", weights=weights).load()
    with pytest.raises(ValueError, match="no such option.*padtype"):
        ImageEmbedder(name="timm:mobilenetv2_100?padtype=same", weights=weights).load()
    with pytest.raises(FileNotFoundError, match="no such file"):
        ImageEmbedder(name="timm:resnet18", weights=str(tmp_path / "none.safetensors")).load()
