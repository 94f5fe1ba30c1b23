import torch

from factory.training.ema import MovingAverage


def test_closed_form() -> None:
    """After n updates: Π d_i p_0 + Σ_k (1 - d_k) Π_{i>k} d_i p_k."""
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    ema = MovingAverage({"p": parameter}, 0.8)
    values = [parameter.detach().clone()]
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        with torch.no_grad():
            parameter.add_(torch.randn(2, generator=generator, dtype=torch.float64))
        values.append(parameter.detach().clone())
        ema.update()
    decays = [ema.decay_at(n) for n in range(40)]
    assert decays[0] == 0.1 and decays[-1] == 0.8 and decays == sorted(decays)
    weights = torch.tensor([1.0] + [1 - d for d in decays], dtype=torch.float64)
    for n, decay in enumerate(decays):
        weights[: n + 1] *= decay
    assert abs(weights.sum() - 1) < 1e-12
    expected = (weights[:, None] * torch.stack(values)).sum(0)
    torch.testing.assert_close(ema.tensors()["p"], expected, rtol=1e-12, atol=1e-12)


def test_applied_restores_the_parameters_bit_for_bit() -> None:
    parameter = torch.nn.Parameter(torch.randn(7, generator=torch.Generator().manual_seed(1)))
    ema = MovingAverage({"p": parameter}, 0.9)
    with torch.no_grad():
        parameter.mul_(1.7)
    ema.update()
    before = parameter.detach().clone()
    try:
        with ema.applied():
            torch.testing.assert_close(parameter.detach(), ema.tensors()["p"], rtol=0, atol=0)
            raise KeyError("anything")
    except KeyError:
        pass
    assert torch.equal(parameter.detach(), before)


def test_decay_zero_is_the_parameters() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    ema = MovingAverage({"p": parameter}, 0.0)
    with torch.no_grad():
        parameter.mul_(3)
    ema.update()
    assert not ema.tensors()
    with ema.applied():
        assert parameter.tolist() == [3.0, 3.0]
