"""Classifiers: every architecture builds; weights come from local files and arrive whole."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from factory.predictors.classifiers import CLASSIFIERS, Classifier
from factory.predictors.networks import count_parameters
from schemas.identity import fingerprint

RandomWeights = Callable[..., Path]
# Published sizes with a head of two classes.
PARAMETERS = {
    "resnet50": 23_512_130,
    "densenet121": 6_955_906,
    "efficientnet_b0": 4_010_110,
    "mobilenetv2_100": 2_226_434,
    "vgg16": 134_268_738,
    "vit_small_patch16_224": 21_597_314,  # at 64 px: 16 patches, not 196
    "small_cnn": 97_938,
}


def pixels(size: int = 32, channels: int = 1, count: int = 4) -> torch.Tensor:
    return torch.rand((count, channels, size, size), generator=torch.Generator().manual_seed(0))


def learn_once(network: nn.Module, inputs: torch.Tensor) -> None:
    network.train()
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    nn.functional.cross_entropy(network(inputs), torch.arange(len(inputs)) % 2).backward()
    optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", CLASSIFIERS)
@pytest.mark.parametrize("channels", [pytest.param(1, marks=pytest.mark.soak), 3])
def test_every_classifier_learns_at_64_px(architecture: str, channels: int) -> None:
    network = Classifier(architecture=architecture).build(2, channels, 64)
    if channels == 3:
        assert count_parameters(network) == PARAMETERS[architecture]
    logits = network.train()(pixels(64, channels, 2))
    assert logits.shape == (2, 2)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_a_transformer_is_built_for_the_size_of_the_images(random_weights: RandomWeights) -> None:
    path = random_weights("test_vit")  # for 160 px
    for size in (64, 96):
        network = Classifier(architecture="test_vit", weights=str(path)).build(2, 1, size)
        assert network.eval()(pixels(size)).shape == (4, 2)
    with pytest.raises(ValueError, match="test_vit: takes sizes that are multiples of 16 px, got 65"):
        Classifier(architecture="test_vit").build(2, 1, 65)


def test_weights_arrive_whole_and_the_head_is_new(random_weights: RandomWeights) -> None:
    path = random_weights("test_resnet", num_classes=7)
    network = Classifier(architecture="test_resnet", weights=str(path)).build(2, 1, 32)
    held, state = load_file(path), network.state_dict()
    loaded = {name.removeprefix("body."): tensor for name, tensor in state.items()}
    assert loaded["fc.weight"].shape == (2, 96) and held["fc.weight"].shape == (7, 96)
    for name, tensor in held.items():
        if not name.startswith("fc."):
            assert torch.equal(loaded[name], tensor), name


def test_weights_that_do_not_fit_are_refused(random_weights: RandomWeights, tmp_path: Path) -> None:
    path = random_weights("test_resnet")
    with pytest.raises(ValueError, match="do not fit test_efficientnet"):
        Classifier(architecture="test_efficientnet", weights=str(path)).build(2, 1, 32)
    tensors = load_file(path)
    del tensors["layer2.0.conv1.weight"]
    save_file(tensors, tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match=r"(?s)do not fit test_resnet.*layer2\.0\.conv1\.weight"):
        Classifier(architecture="test_resnet", weights=str(tmp_path / "short.safetensors")).build(2, 1, 32)
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        Classifier(architecture="test_resnet", weights=str(tmp_path / "text.safetensors")).build(2, 1, 32)
    with pytest.raises(FileNotFoundError, match="no file"):
        Classifier(weights=str(tmp_path / "absent.safetensors"))
    with pytest.raises(ValueError, match="never pickles"):
        Classifier(weights=str(tmp_path / "weights.pt"))


def test_identity_holds_the_bytes_of_the_weights_not_their_place(
    random_weights: RandomWeights, tmp_path: Path
) -> None:
    path = random_weights("test_resnet")
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(path.read_bytes())
    one, same = (Classifier(architecture="test_resnet", weights=str(place)) for place in (path, copy))
    other = Classifier(architecture="test_resnet", weights=str(random_weights("test_resnet", seed=1)))
    bare = Classifier(architecture="test_resnet")
    assert fingerprint(one) == fingerprint(same)
    assert len({fingerprint(predictor) for predictor in (one, other, bare)}) == 3
    declared = Classifier(architecture="test_resnet", weights_digest=one.weights_digest)
    assert fingerprint(declared) == fingerprint(one)
    with pytest.raises(ValueError, match="give the file with digest"):
        declared.build(2, 1, 32)
    with pytest.raises(ValueError, match="has digest"):
        Classifier(architecture="test_resnet", weights=str(path), weights_digest=other.weights_digest)


def test_a_grey_image_is_its_grey_colour_image(random_weights: RandomWeights) -> None:
    path = random_weights("test_resnet")
    grey = pixels()
    outputs = []
    for channels in (1, 3):
        torch.manual_seed(0)
        network = Classifier(architecture="test_resnet", weights=str(path)).build(2, channels, 32).eval()
        outputs.append(network(grey.expand(-1, channels, -1, -1)))
    torch.testing.assert_close(outputs[0], outputs[1])


def test_the_declared_normalisation_is_used() -> None:
    torch.manual_seed(0)
    ours = Classifier(architecture="test_resnet?mean=0.5&std=0.25").build(2, 3, 32).eval()
    inputs = pixels(channels=3)
    expected = ours.body((inputs - 0.5) / 0.25)  # type: ignore[operator]
    torch.testing.assert_close(ours(inputs), expected)


def test_only_the_head_of_a_frozen_network_changes(random_weights: RandomWeights) -> None:
    path = random_weights("test_resnet")
    network = Classifier(architecture="test_resnet", weights=str(path), frozen=True).build(2, 1, 32)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    learn_once(network, pixels())
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"body.fc.weight", "body.fc.bias"}


def test_frozen_statistics_stay_while_weights_learn() -> None:
    for frozen_statistics in (True, False):
        predictor = Classifier(architecture="small_cnn?width=4", frozen_statistics=frozen_statistics)
        network = predictor.build(2, 1, 32)
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        learn_once(network, pixels())
        after = network.state_dict()
        assert not torch.equal(after["body.features.0.weight"], before["body.features.0.weight"])
        kept = torch.equal(after["body.features.1.running_mean"], before["body.features.1.running_mean"])
        assert kept == frozen_statistics


def folded(path: Path) -> Path:
    """Weights as after folding: every normalisation is an offset alone."""
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.replace("running_mean", "bias") in tensors and name.endswith("running_mean"):
            tensors[name.replace("running_mean", "bias")] = torch.full_like(tensor, 0.1)
    save_file(tensors, path.with_name("folded.safetensors"))
    return path.with_name("folded.safetensors")


def test_weights_with_a_folded_normalisation_keep_its_statistics(random_weights: RandomWeights) -> None:
    path = random_weights("test_resnet")
    assert not Classifier(architecture="test_resnet", weights=str(path)).frozen_statistics
    predictor = Classifier(architecture="test_resnet", weights=str(folded(path)))
    assert predictor.frozen_statistics
    network = predictor.build(2, 1, 32)
    learn_once(network, pixels())
    assert all(
        not tensor.any() for name, tensor in network.state_dict().items() if name.endswith("running_mean")
    )
    loose = Classifier(architecture="test_resnet", weights=str(folded(path)), frozen_statistics=False)
    assert not loose.frozen_statistics and fingerprint(loose) != fingerprint(predictor)


def test_an_encoder_keeps_them_and_its_decoder_learns(random_weights: RandomWeights) -> None:
    path = folded(random_weights("test_resnet"))
    from factory.predictors.segmenters import Segmenter

    predictor = Segmenter(architecture="unet", encoder="test_resnet", weights=str(path))
    assert predictor.frozen_statistics
    network = predictor.build(1, 1, 64).train()
    network(pixels(64))
    means = {name: t for name, t in network.state_dict().items() if name.endswith("running_mean")}
    assert all(tensor.any() == (".encoder." not in name) for name, tensor in means.items())
    assert any(".encoder." in name for name in means) and any(".decoder." in name for name in means)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": ""}, "architecture: want a timm name"),
        ({"architecture": "hf-hub:someone/model"}, "architecture: want a timm name"),
        ({"architecture": "resnet50?std=0"}, "std must be positive"),
        ({"dropout": 1.0}, "dropout: want 0 ≤ p < 1"),
        ({"frozen": True}, "a frozen network needs weights"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Classifier(**fields)  # type: ignore[arg-type]


def test_names_that_timm_does_not_know_are_refused() -> None:
    with pytest.raises(ValueError, match=r"timm has no such network; near: resnet"):
        Classifier(architecture="resnet5").build(2, 1, 32)
    with pytest.raises(ValueError, match="test_resnet: cannot be built"):
        Classifier(architecture="test_resnet?colour=3").build(2, 1, 32)
    with pytest.raises(ValueError, match=r"want small_cnn\?width=1 … 256"):
        Classifier(architecture="small_cnn?depth=3").build(2, 1, 32)
