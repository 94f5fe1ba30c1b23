from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from real_table import RESOLUTION, make_rows, make_task, write_real

from factory.imaging import as_rgb
from factory.storage import open_table
from factory.training.examples import Latents
from factory.training.latent_cache import (
    Variant,
    embed_prompts,
    encoder_of,
    fill_latents,
    latent_kl,
    latents_uri,
    missing_latents,
    prompts_uri,
    read_latents,
)
from factory.training.task import load_rows

BOTH = (Variant(), Variant(flipped=True))


def test_cached_latents_equal_direct_encoding(tmp_path: Path, random_base: Path) -> None:
    real = write_real(tmp_path / "real.lance", make_rows())
    task = make_task(random_base, real, tmp_path / "out")
    generator = task.generator.load()
    rows = load_rows(task, "train")
    uri = latents_uri(real, task.generator)
    assert uri.startswith(f"{real}.cache/latents-") and uri.endswith(f"-{RESOLUTION}.lance")
    assert fill_latents(uri, rows, encoder_of(generator), variants=BOTH, batch_size=3) == 2 * len(rows)
    order = [rows[i] for i in (3, 0, 7)]
    cached = read_latents(uri, order, BOTH)
    images = np.stack([as_rgb(row.image) for row in order])
    for flipped, mean, logvar in (
        (False, cached.mean, cached.logvar),
        (True, cached.flipped_mean, cached.flipped_logvar),
    ):
        direct = generator.encode_images(np.ascontiguousarray(images[:, :, ::-1]) if flipped else images)
        np.testing.assert_allclose(mean, direct[0].numpy(), rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(logvar, direct[1].numpy(), rtol=2e-3, atol=2e-3)
    # The latents of a mirrored image are not the mirrored latents.
    assert np.abs(cached.flipped_mean - cached.mean[..., ::-1]).max() > 0.01


def test_only_what_is_missing_is_encoded(tmp_path: Path, random_base: Path) -> None:
    real = write_real(tmp_path / "real.lance", make_rows())
    task = make_task(random_base, real, tmp_path / "out")
    rows = load_rows(task, "train")
    uri = latents_uri(real, task.generator)
    encoded: list[int] = []

    def encode(images: np.ndarray, hidden: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        encoded.append(len(images))
        mean = np.repeat(images[:, None, ::8, ::8, 0] / 255, 2, axis=1).astype(np.float16)
        return mean, np.zeros_like(mean)

    assert fill_latents(uri, rows[:4], encode, batch_size=3) == 4 and encoded == [3, 1]
    assert fill_latents(uri, rows[:4], encode) == 0 and encoded == [3, 1]
    # The table changed: other rows appear, the old ones stay cached.
    write_real(tmp_path / "real.lance", make_rows() + make_rows(seed=1), overwrite=True)
    changed = load_rows(make_task(random_base, real, tmp_path / "out"), "train")
    assert len(missing_latents(uri, changed, (Variant(),))) == len(changed) - 4
    assert fill_latents(uri, changed, encode) == len(changed) - 4
    assert open_table(uri).count() == len(changed)
    assert read_latents(uri, changed).mean.shape == (len(changed), 2, 8, 8)
    with pytest.raises(ValueError, match="lacks the latents of 1 images, first nowhere"):
        read_latents(uri, [*changed, replace(changed[0], image_id="nowhere")])


def test_work_done_before_a_failure_is_kept(tmp_path: Path, random_base: Path) -> None:
    real = write_real(tmp_path / "real.lance", make_rows(num_train=600, num_val=0))
    task = make_task(random_base, real, tmp_path / "out")
    rows = load_rows(task, "train")
    uri = latents_uri(real, task.generator)
    calls = 0

    def encode(images: np.ndarray, hidden: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        nonlocal calls
        calls += 1
        if calls == 40:
            raise RuntimeError("out of memory")
        values = np.zeros((len(images), 1, 2, 2), np.float16)
        return values, values

    with pytest.raises(RuntimeError):
        fill_latents(uri, rows, encode)
    assert open_table(uri).count() == 256
    assert fill_latents(uri, rows, encode) == 600 - 256


def test_latents_that_are_not_finite_are_named(tmp_path: Path, random_base: Path) -> None:
    real = write_real(tmp_path / "real.lance", make_rows())
    rows = load_rows(make_task(random_base, real, tmp_path / "out"), "train")

    def encode(images: np.ndarray, hidden: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        values = np.zeros((len(images), 1, 2, 2), np.float16)
        values[1] = np.inf
        return values, values

    with pytest.raises(ValueError, match=rows[1].image_id):
        fill_latents(str(tmp_path / "cache.lance"), rows, encode)


def test_prompts_are_embedded_once(tmp_path: Path, random_base: Path) -> None:
    real = write_real(tmp_path / "real.lance", make_rows())
    task = make_task(random_base, real, tmp_path / "out")
    generator = task.generator.load()
    uri = prompts_uri(real, task.generator)
    asked: list[str] = []

    def embed(prompts: list[str]) -> np.ndarray:
        asked.extend(prompts)
        return generator.encode_prompts(prompts).numpy()

    first = embed_prompts(uri, ["", "a benign tumor", "", "a cyst"], embed)
    assert asked == ["", "a benign tumor", "a cyst"] and first.shape[0] == 4
    again = embed_prompts(uri, ["a cyst", "normal tissue", ""], embed)
    assert asked[3:] == ["normal tissue"]
    np.testing.assert_array_equal(again[[0, 2]], first[[3, 0]])
    torch.testing.assert_close(torch.from_numpy(first[:1]), generator.null_prompt())


def test_latent_kl_is_that_of_torch() -> None:
    rng = np.random.default_rng(0)
    mean = rng.normal(0, 2, (5, 4, 3, 3)).astype(np.float16)
    logvar = rng.normal(-3, 1, (5, 4, 3, 3)).astype(np.float16)
    scale = 0.18215
    posterior = torch.distributions.Normal(
        torch.from_numpy(mean).double() / scale, torch.exp(0.5 * torch.from_numpy(logvar).double()) / scale
    )
    unit = torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(posterior, unit).sum((1, 2, 3)).mean().item()
    values = latent_kl(Latents(mean=mean, logvar=logvar), scale)
    assert values["latent_kl"] == pytest.approx(expected, rel=1e-6)
    assert values["latent_kl_per_number"] == pytest.approx(expected / 36, rel=1e-6)
