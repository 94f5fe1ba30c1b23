import pytest

from factory.training.settings import TrainingSettings
from schemas.identity import fingerprint


def test_warmup_rises_linearly_then_stays() -> None:
    settings = TrainingSettings(max_steps=1400, warmup_steps=500, learning_rate=1e-4)
    assert settings.learning_rate_at(0) == pytest.approx(1e-4 / 500)
    assert settings.learning_rate_at(249) == pytest.approx(0.5e-4)
    assert (
        settings.learning_rate_at(499)
        == settings.learning_rate_at(500)
        == settings.learning_rate_at(1399)
        == 1e-4
    )
    assert TrainingSettings(max_steps=1, warmup_steps=0).learning_rate_at(0) == 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"max_steps": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"ema_decay": 1.0}, {"prompt_dropout": -0.1},
        {"min_snr_gamma": 0.0}, {"mixed_precision": "fp16"}, {"warmup_steps": -1}, {"max_grad_norm": 0.0},
        {"batch_size": 8, "gradient_accumulation_steps": 3}, {"keep_checkpoints": 0},
    ],
)  # fmt: skip
def test_bad_values_name_their_field(changes: dict) -> None:
    with pytest.raises(ValueError, match=f"training.{next(iter(changes))}"):
        TrainingSettings(**{"max_steps": 10, **changes})


def test_batch_must_divide_over_workers_and_accumulation() -> None:
    settings = TrainingSettings(max_steps=1, batch_size=8, gradient_accumulation_steps=2)
    for workers in (0, 1, 2, 4):
        settings.check_world_size(workers)
    with pytest.raises(ValueError, match=r"batch_size: 8 .* 3 workers × 2 .*choose 12"):
        settings.check_world_size(3)


def test_execution_does_not_enter_the_fingerprint() -> None:
    plain = TrainingSettings(max_steps=10)
    fast = TrainingSettings(
        max_steps=10, gradient_accumulation_steps=4, mixed_precision="bf16", compile=True, checkpoint_every=7
    )
    assert fingerprint(plain) == fingerprint(fast)
    assert fingerprint(plain) != fingerprint(TrainingSettings(max_steps=10, seed=1))
