"""Maps of words: weights, normalisation, and refinement by self-attention."""

import pytest
import torch
from attention_batch import make_batch, make_latents, make_step, make_unet

from factory.diffusion.attention_maps import AttentionRecord, min_max, refine, token_weights


def planted(side: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """A block of cells (1 inside, (n,)), and self-attention (1, n, n) that stays on its side of it."""
    block = torch.zeros(side, side)
    block[4:11, 3:9] = 1
    inside = block.flatten()
    same = (inside[:, None] == inside[None]).float() + 0.02
    noise = torch.rand(same.shape, generator=torch.Generator().manual_seed(0)) * 0.5
    matrix = same * (0.75 + noise)
    return inside, (matrix / matrix.sum(dim=-1, keepdim=True))[None]


def test_planted_block_comes_back_from_blurred_cross_attention() -> None:
    inside, matrix = planted()
    rough = torch.nn.functional.avg_pool2d(inside.reshape(1, 1, 16, 16), 2)[:, 0]
    rough = rough + 0.4 * torch.rand(rough.shape, generator=torch.Generator().manual_seed(1))
    refined = refine(matrix, rough, 4).flatten()
    assert torch.equal((refined > 0.5).float(), inside)
    unrefined = torch.nn.functional.interpolate(rough[:, None], size=(16, 16), mode="bicubic").flatten()
    assert not torch.equal((min_max(unrefined) > 0.5).float(), inside)


def test_refine_is_the_matrix_power_and_normalising_it_first_changes_nothing() -> None:
    _, matrix = planted()
    cross = torch.rand((1, 16, 16), generator=torch.Generator().manual_seed(2))
    power = torch.linalg.matrix_power(matrix[0].double(), 4)
    assert torch.allclose(power.sum(dim=-1), torch.ones(256, dtype=torch.float64))
    expected = min_max(power @ cross.flatten().double())
    assert torch.allclose(refine(matrix, cross, 4).flatten().double(), expected, atol=1e-4)
    stretched = (power - power.min()) / (power.max() - power.min())
    assert torch.allclose(min_max(stretched @ cross.flatten().double()), expected, atol=1e-9)


def test_elementwise_power_is_something_else() -> None:
    _, matrix = planted()
    cross = torch.rand((1, 16, 16), generator=torch.Generator().manual_seed(2))
    expected = min_max(matrix[0].double().pow(4) @ cross.flatten().double())
    literal = refine(matrix, cross, 4, "paper").flatten()
    assert torch.allclose(literal.double(), expected, atol=1e-4)
    assert (literal - refine(matrix, cross, 4).flatten()).abs().max() > 0.05


def test_token_weights_average_a_words_pieces() -> None:
    weights = token_weights([[[2], []], [[3, 4], [1]]], 6)
    assert weights.shape == (2, 2, 6)
    assert weights[0, 0].tolist() == [0, 0, 1, 0, 0, 0]
    assert weights[0, 1].tolist() == [0, 0, 0, 0.5, 0.5, 0]
    assert weights[1, 0].sum() == 0


def test_min_max_of_a_constant_map_is_zero() -> None:
    assert torch.equal(min_max(torch.full((1, 4), 0.3)), torch.zeros(1, 4))


def test_the_record_reads_the_last_step_only() -> None:
    unet = make_unet()
    calls: list[int] = []
    unet.register_forward_hook(lambda *_: calls.append(1))
    record = AttentionRecord(
        make_batch(unet, 2), "<lesion>", cross_side=4, self_side=8, power=4, form="matrix"
    )
    latents = make_latents(2)
    for index in range(9):
        assert record.before_step(latents, make_step(index)) is latents
    assert not calls
    with pytest.raises(RuntimeError, match="last step"):
        record.maps()
    record.before_step(latents, make_step(9))
    assert len(calls) == 1
    maps = record.maps()
    assert maps.shape == (2, 32, 32) and maps.dtype == torch.uint8
    assert maps.flatten(1).amax(dim=1).tolist() == [255, 255] and maps.flatten(1).amin(dim=1).tolist() == [
        0,
        0,
    ]


def test_the_record_refuses_a_missing_word_and_a_missing_side() -> None:
    batch = make_batch(make_unet(), 1)
    options = {"self_side": 8, "power": 4, "form": "matrix"}
    with pytest.raises(ValueError, match="'prompt 0' has no 'absent'"):
        AttentionRecord(batch, "absent", cross_side=4, **options)  # type: ignore[arg-type]
    record = AttentionRecord(batch, "<lesion>", cross_side=16, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sides 8, 4"):
        record.before_step(make_latents(1), make_step(0))
