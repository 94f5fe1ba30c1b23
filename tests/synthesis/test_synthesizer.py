"""The Synthesizer: an image follows from its request alone, and one bad item harms no other."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_generators import RESOLUTION, disturb, mask_generator

from factory.diffusion.sampling import Sampling
from factory.generators.conditioning import TextOnly
from factory.generators.latent_diffusion import LatentDiffusion
from factory.synthesis.annotators import RequestedMask
from factory.synthesis.synthesizer import (
    IMAGE_TOLERANCE,
    GeneratedImage,
    PreparedRequest,
    Synthesizer,
    is_out_of_memory,
)
from schemas.request import SynthesisPlan
from schemas.sample import QuarantineReason

LABELS = ("benign", "malignant")


@pytest.fixture(scope="module")
def generator(base: Path) -> LatentDiffusion:
    return mask_generator(base)


@pytest.fixture(scope="module")
def checkpoint(generator: LatentDiffusion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    loaded = generator.load()
    disturb(loaded, size=0.1)
    folder = tmp_path_factory.mktemp("checkpoint")
    loaded.save(folder, {"name": "tiny"})
    return folder


def make(
    kind: type[Synthesizer], generator: LatentDiffusion, checkpoint: Path | None, **kwargs: Any
) -> Synthesizer:
    sampling = kwargs.pop("sampling", Sampling(num_inference_steps=4, guidance_scale=2.0))
    kwargs.setdefault("batch_size", 4)
    annotator = kwargs.pop("annotator", RequestedMask())
    return kind(generator, checkpoint, sampling, kwargs.pop("guidances", ()), annotator, **kwargs)


def prepared(count: int) -> list[PreparedRequest]:
    plan = SynthesisPlan(recipe="tiny", fingerprint="f", weights={}, real_digest="r", labels=LABELS)
    out = []
    for i in range(count):
        mask = np.zeros((RESOLUTION, RESOLUTION), np.uint8)
        mask[10 + i : 30 + i, 15:45] = 1
        label = LABELS[i % 2]
        out.append(
            PreparedRequest(
                request=plan.request(label, i),
                requested_mask=mask,
                prompt=f"breast ultrasound image of {label} tumor.",
            )
        )
    return out


def images(results: list[GeneratedImage]) -> dict[str, np.ndarray]:
    assert all(r.error is None and r.reason is None for r in results)
    return {r.request_id: r.image.astype(int) for r in results if r.image is not None}


def largest_difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> int:
    assert set(a) == set(b)
    return max(int(np.abs(a[name] - b[name]).max()) for name in a)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "unipc", "euler"])
def test_images_do_not_depend_on_batch_size(generator: LatentDiffusion, checkpoint: Path, name: str) -> None:
    sampling = Sampling(noise_scheduler=name, num_inference_steps=4, guidance_scale=2.0)  # type: ignore[arg-type]
    requests = prepared(16 if name == "ddim" else 6)
    by_batch = {}
    for batch_size in (1, 4, 16):
        synthesizer = make(Synthesizer, generator, checkpoint, sampling=sampling, batch_size=batch_size)
        by_batch[batch_size] = images(synthesizer.synthesize(requests))
    assert largest_difference(by_batch[1], by_batch[4]) <= IMAGE_TOLERANCE
    assert largest_difference(by_batch[1], by_batch[16]) <= IMAGE_TOLERANCE
    assert len({image.tobytes() for image in by_batch[1].values()}) == len(requests)


def test_noise_is_bit_equal_and_the_requests_own(generator: LatentDiffusion, checkpoint: Path) -> None:
    first = make(Synthesizer, generator, checkpoint)
    second = make(Synthesizer, generator, checkpoint, batch_size=1)
    ids = [p.request.request_id for p in prepared(3)]
    second.synthesize(prepared(3))
    for request_id in ids:
        assert torch.equal(first.noise(request_id), second.noise(request_id))
    assert not torch.equal(first.noise(ids[0]), first.noise(ids[1]))
    assert first.noise(ids[0]).shape == first.latent_shape


def test_order_changes_nothing(generator: LatentDiffusion, checkpoint: Path) -> None:
    requests = prepared(7)
    synthesizer = make(Synthesizer, generator, checkpoint)
    forward = synthesizer.synthesize(requests)
    backward = synthesizer.synthesize(requests[::-1])
    assert [r.request_id for r in forward] == [p.request.request_id for p in requests]
    assert [r.request_id for r in backward] == [p.request.request_id for p in requests[::-1]]
    assert largest_difference(images(forward), images(backward)) <= IMAGE_TOLERANCE


def test_same_batch_is_bit_equal_in_a_new_synthesizer(generator: LatentDiffusion, checkpoint: Path) -> None:
    requests = prepared(4)
    first = images(make(Synthesizer, generator, checkpoint).synthesize(requests))
    torch.rand(11)
    assert (
        largest_difference(first, images(make(Synthesizer, generator, checkpoint).synthesize(requests))) == 0
    )


def test_stochastic_sampling_is_the_requests_own(generator: LatentDiffusion, checkpoint: Path) -> None:
    sampling = Sampling(num_inference_steps=4, guidance_scale=2.0, eta=1.0)
    requests = prepared(5)
    together = images(
        make(Synthesizer, generator, checkpoint, sampling=sampling, batch_size=5).synthesize(requests)
    )
    alone = images(
        make(Synthesizer, generator, checkpoint, sampling=sampling, batch_size=1).synthesize(requests)
    )
    assert largest_difference(together, alone) <= IMAGE_TOLERANCE


def test_prompt_mask_and_seed_each_matter(generator: LatentDiffusion, checkpoint: Path) -> None:
    synthesizer = make(Synthesizer, generator, checkpoint)
    one = prepared(1)[0]
    moved = np.roll(one.requested_mask, 20, axis=1) if one.requested_mask is not None else None
    variants = [
        one,
        PreparedRequest(request=one.request, requested_mask=moved, prompt=one.prompt),
        PreparedRequest(request=one.request, requested_mask=one.requested_mask, prompt="malignant"),
        PreparedRequest(request=prepared(2)[1].request, requested_mask=one.requested_mask, prompt=one.prompt),
    ]
    made = [r.image for r in synthesizer.synthesize(variants)]
    assert all(image is not None for image in made)
    assert len({image.tobytes() for image in made if image is not None}) == 4


def test_each_distinct_prompt_is_encoded_once(generator: LatentDiffusion, checkpoint: Path) -> None:
    synthesizer = make(Synthesizer, generator, checkpoint, batch_size=3)
    synthesizer.synthesize(prepared(10))
    synthesizer.synthesize(prepared(4))
    assert synthesizer.num_encoded_prompts == 3  # two prompts and the empty one


def test_result_is_grey_with_its_label_mask(generator: LatentDiffusion, checkpoint: Path) -> None:
    requests = prepared(2)
    for request, result in zip(requests, make(Synthesizer, generator, checkpoint).synthesize(requests)):
        assert result.image is not None and result.image.dtype == np.uint8
        assert result.image.shape == (RESOLUTION, RESOLUTION)
        np.testing.assert_array_equal(result.mask, request.requested_mask)
        assert result.mask is not request.requested_mask
        assert result.channel_spread > 0 and result.seconds > 0


def test_image_is_the_channel_mean_and_the_spread_is_reported(
    generator: LatentDiffusion, checkpoint: Path
) -> None:
    """Against the plain loop over the same generator, without the Synthesizer's short cuts."""
    from factory.diffusion.denoise import denoise, make_noise_scheduler

    sampling = Sampling(num_inference_steps=4, guidance_scale=2.0)
    one = prepared(1)[0]
    synthesizer = make(Synthesizer, generator, checkpoint)
    result = synthesizer.synthesize([one])[0]
    loaded = generator.load(checkpoint)
    assert one.requested_mask is not None and result.image is not None
    masks = torch.from_numpy(one.requested_mask[None])
    conditions = loaded.conditions(loaded.encode_prompts([one.prompt]), masks=masks)
    latents = denoise(
        loaded.denoiser(),
        make_noise_scheduler(sampling, loaded.noise_scheduler.config),
        synthesizer.noise(one.request.request_id)[None],
        conditions,
        loaded.unconditional(conditions, loaded.null_prompt()),
        num_inference_steps=4,
        guidance_scale=2.0,
    )
    rgb = loaded.decode(latents)[0].numpy().astype(float)
    assert np.abs(rgb.mean(axis=2) - result.image).max() <= 2.5
    assert result.channel_spread == pytest.approx((rgb.max(axis=2) - rgb.min(axis=2)).mean(), abs=1.0)


def test_bad_masks_fail_alone(generator: LatentDiffusion, checkpoint: Path) -> None:
    requests = prepared(5)
    bad = [
        None,
        np.zeros((RESOLUTION, RESOLUTION), np.float32),
        np.zeros((RESOLUTION, 2 * RESOLUTION), np.uint8),
        np.full((RESOLUTION, RESOLUTION), 7, np.uint8),
    ]
    mixed = [
        *[
            PreparedRequest(request=p.request, requested_mask=mask, prompt=p.prompt)
            for p, mask in zip(requests, bad)
        ],
        requests[4],
    ]
    results = make(Synthesizer, generator, checkpoint).synthesize(mixed)
    assert [r.request_id for r in results] == [p.request.request_id for p in requests]
    assert [r.reason for r in results[:4]] == [QuarantineReason.GENERATION_FAILED] * 4
    for result, words in zip(results, ("no requested_mask", "float32", "128", "class 7")):
        assert result.error is not None and words in result.error and result.image is None
    good = make(Synthesizer, generator, checkpoint).synthesize([requests[4]])
    assert largest_difference(images(results[4:]), images(good)) <= IMAGE_TOLERANCE


class NoiseOutOfRange(Synthesizer):
    """One request starts from noise that is no number."""

    broken = ""

    def noise(self, request_id: str) -> torch.Tensor:
        return super().noise(request_id) + (float("inf") if request_id == self.broken else 0.0)


def test_image_that_is_not_finite_fails_alone(generator: LatentDiffusion, checkpoint: Path) -> None:
    requests = prepared(4)
    synthesizer = make(NoiseOutOfRange, generator, checkpoint)
    synthesizer.broken = requests[2].request.request_id
    results = synthesizer.synthesize(requests)
    assert results[2].reason is QuarantineReason.NOT_FINITE and results[2].image is None
    others = [r for i, r in enumerate(results) if i != 2]
    expected = make(Synthesizer, generator, checkpoint).synthesize(
        [p for i, p in enumerate(requests) if i != 2]
    )
    assert largest_difference(images(others), images(expected)) <= IMAGE_TOLERANCE


class SmallDevice(Synthesizer):
    """A device with room for so many images at once."""

    room = 3

    def _launch(self, requests: list[PreparedRequest]) -> Any:
        if len(requests) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super()._launch(requests)


def test_batch_that_does_not_fit_is_halved_for_good(generator: LatentDiffusion, checkpoint: Path) -> None:
    requests = prepared(11)
    synthesizer = make(SmallDevice, generator, checkpoint, batch_size=8)
    results = synthesizer.synthesize(requests)
    assert [r.request_id for r in results] == [p.request.request_id for p in requests]
    assert synthesizer.batch_size == 2
    expected = make(Synthesizer, generator, checkpoint, batch_size=2).synthesize(requests)
    assert largest_difference(images(results), images(expected)) == 0


def test_single_image_that_does_not_fit_is_an_error_of_its_own(
    generator: LatentDiffusion, checkpoint: Path
) -> None:
    synthesizer = make(SmallDevice, generator, checkpoint, batch_size=2)
    synthesizer.room = 0
    results = synthesizer.synthesize(prepared(3))
    assert [r.reason for r in results] == [QuarantineReason.OUT_OF_MEMORY] * 3


def test_real_shortage_of_memory_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 48, dtype=torch.float32)
    assert is_out_of_memory(caught.value)
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert not is_out_of_memory(caught.value)


class BrokenDevice(Synthesizer):
    def _launch(self, requests: list[PreparedRequest]) -> Any:
        return torch.zeros(2, 3) @ torch.zeros(2, 3)


def test_other_faults_are_not_swallowed(generator: LatentDiffusion, checkpoint: Path) -> None:
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        make(BrokenDevice, generator, checkpoint).synthesize(prepared(1))


def test_text_only_generator_needs_no_mask(base: Path) -> None:
    generator = LatentDiffusion(base=str(base), conditioning=TextOnly(), resolution=RESOLUTION)
    bare = [PreparedRequest(request=p.request, requested_mask=None, prompt=p.prompt) for p in prepared(3)]
    results = make(Synthesizer, generator, None, batch_size=2, annotator=None).synthesize(bare)
    assert len(images(results)) == 3 and all(r.mask is None for r in results)


def test_guidance_scale_one_encodes_no_empty_prompt(generator: LatentDiffusion, checkpoint: Path) -> None:
    synthesizer = make(
        Synthesizer, generator, checkpoint, sampling=Sampling(num_inference_steps=2, guidance_scale=1.0)
    )
    assert len(images(synthesizer.synthesize(prepared(2)))) == 2
    assert synthesizer.num_encoded_prompts == 2


def test_nothing_asked_nothing_made(generator: LatentDiffusion, checkpoint: Path) -> None:
    assert make(Synthesizer, generator, checkpoint).synthesize([]) == []
    with pytest.raises(ValueError, match="batch_size=0"):
        make(Synthesizer, generator, checkpoint, batch_size=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees_with_cpu(generator: LatentDiffusion, checkpoint: Path) -> None:
    requests = prepared(6)
    on_cpu = images(make(Synthesizer, generator, checkpoint).synthesize(requests))
    on_gpu = images(make(Synthesizer, generator, checkpoint, device="cuda").synthesize(requests))
    differences = [np.abs(on_cpu[name] - on_gpu[name]).mean() for name in on_cpu]
    assert max(differences) < 1.0


@pytest.mark.slow
def test_compiled_models_pad_the_last_batch(base: Path) -> None:
    generator = LatentDiffusion(base=str(base), conditioning=TextOnly(), resolution=RESOLUTION)
    bare = [PreparedRequest(request=p.request, requested_mask=None, prompt=p.prompt) for p in prepared(5)]
    sampling = Sampling(num_inference_steps=2, guidance_scale=1.0)
    plain = images(make(Synthesizer, generator, None, sampling=sampling, annotator=None).synthesize(bare))
    compiled = make(Synthesizer, generator, None, sampling=sampling, compile=True, annotator=None).synthesize(
        bare
    )
    assert largest_difference(plain, images(compiled)) <= IMAGE_TOLERANCE


def test_what_reads_attention_is_not_compiled(generator: LatentDiffusion, checkpoint: Path) -> None:
    from factory.synthesis.attention_annotator import AttentionOtsu

    with pytest.raises(ValueError, match="compile: AttentionOtsu"):
        make(Synthesizer, generator, checkpoint, annotator=AttentionOtsu(), compile=True)
