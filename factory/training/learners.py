"""What learns: a learner owns its module, optimizer and moving average, and takes one step at a time.

The loop knows a learner only by `draw(shard) -> batch`, `step(batch) -> metrics`, `validate() -> metrics`,
`averaged()`, `tensors()`, `state_dict()`, `load(tensors, state)` and `finish()`, so a learner with two
optimizers, or one that is no diffusion model, runs in the same loop.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from factory.training.ema import MovingAverage
from factory.training.examples import DiffusionBatch, Examples
from factory.training.mixture import Shard
from factory.training.objectives import (
    PREDICTION_TYPES,
    NoisePrediction,
    PredictionStep,
    add_noise,
    min_snr_weights,
)
from factory.training.settings import TrainingSettings
from factory.training.world import World
from schemas.identity import torch_seed


class DiffusionLearner:
    """Trains a denoiser's trainable parameters on cached latents.

    Args:
        denoiser: `forward(latents, timesteps, prompt_embeds, controlnet_cond)`, on the world's device, fp32.
        examples: training rows.
        prompt_embeds: the prompt table, float (P, L, D); row 0 is the null prompt.
        condition: label maps uint8 (b, R, R) → (b, K, R, R) in [0, 1]; None where no mask goes in.
        alphas_cumprod: ᾱ of the noise scheduler, float (T,).
        prediction_type: "epsilon" or "v_prediction".
        objectives: summed with their weights.
        settings: optimisation.
        world: the processes that train together.
        validation: fixed inputs of held-out rows, or None.
    """

    def __init__(
        self,
        *,
        denoiser: nn.Module,
        examples: Examples,
        prompt_embeds: Tensor,
        condition: Callable[[Tensor], Tensor | None] | None,
        alphas_cumprod: Tensor,
        prediction_type: str,
        objectives: Sequence[NoisePrediction],
        settings: TrainingSettings,
        world: World,
        validation: DiffusionBatch | None = None,
    ) -> None:
        assert prediction_type in PREDICTION_TYPES, prediction_type
        self.settings, self.world, self.objectives = settings, world, tuple(objectives)
        self.examples, self.validation = examples, validation
        self.prediction_type = prediction_type
        self._condition = condition
        self._prompt_embeds = prompt_embeds.to(world.device)
        self._alphas_cumprod = alphas_cumprod.to(world.device, torch.float32)
        on_cuda = torch.device(world.device).type == "cuda"
        channels_last = on_cuda if settings.channels_last is None else settings.channels_last
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        if channels_last:
            denoiser.to(memory_format=torch.channels_last)
        self._autocast = uses_bf16(settings, world.device)
        self.denoiser = denoiser
        self.parameters = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("denoiser: no parameter requires a gradient, nothing would be trained")
        self.ema = MovingAverage(self.parameters, settings.ema_decay)
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=settings.learning_rate,
            betas=settings.adam_betas,
            weight_decay=settings.weight_decay,
            fused=on_cuda or None,
        )
        self._ddp = world.prepare(denoiser)
        self._model: Callable[..., Tensor] = torch.compile(self._ddp) if settings.compile else self._ddp

    def draw(self, shard: Shard) -> DiffusionBatch:
        """Inputs on the CPU; a pure function, safe to call in a thread."""
        return self.examples.draw(shard)

    def step(self, batch: DiffusionBatch) -> dict[str, Tensor]:
        """One optimizer update from this process's share of a global batch. Returns scalars on the device."""
        self.denoiser.train()
        learning_rate = self.settings.learning_rate_at(batch.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        # Dropout inside a module, where there is any, is a function of (seed, step) too.
        torch.manual_seed(torch_seed(f"training/{self.settings.seed}/{batch.step}", "modules"))
        parts = batch.to(self.world.device).split(self.settings.gradient_accumulation_steps)
        totals: dict[str, Tensor] = {}
        for number, part in enumerate(parts):
            with self._gradients_stay_local(number < len(parts) - 1):
                losses = self._losses(self._model, part)
                (losses["loss"].mean() / len(parts)).backward()
            for name, value in losses.items():
                mean = value.detach().mean() / len(parts)
                totals[name] = totals[name] + mean if name in totals else mean
        totals["grad_norm"] = nn.utils.clip_grad_norm_(
            list(self.parameters.values()), self.settings.max_grad_norm
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()
        return totals

    def _gradients_stay_local(self, local: bool) -> contextlib.AbstractContextManager[Any]:
        """Only the last micro-batch averages gradients over the processes."""
        if local and isinstance(self._ddp, nn.parallel.DistributedDataParallel):
            return self._ddp.no_sync()
        return contextlib.nullcontext()

    def _losses(self, model: Callable[..., Tensor], batch: DiffusionBatch) -> dict[str, Tensor]:
        """Loss of each image, (b,): "loss" is the weighted sum; each objective also by name if there are several."""
        step = self._denoise(model, batch)
        terms = [objective.loss(step) for objective in self.objectives]
        losses = {
            "loss": sum((o.weight * t for o, t in zip(self.objectives, terms)), torch.zeros_like(terms[0]))
        }
        if len(terms) > 1:
            losses |= {type(o).__name__: t for o, t in zip(self.objectives, terms)}
        return losses

    def _denoise(self, model: Callable[..., Tensor], batch: DiffusionBatch) -> PredictionStep:
        controlnet_cond = None
        if self._condition is not None and batch.masks is not None:
            controlnet_cond = self._condition(batch.masks)
        noisy = add_noise(batch.latents, batch.noise, self._alphas_cumprod[batch.timesteps])
        with torch.autocast(torch.device(self.world.device).type, torch.bfloat16, enabled=self._autocast):
            model_pred = model(
                noisy.contiguous(memory_format=self._memory_format),
                batch.timesteps,
                self._prompt_embeds[batch.prompts],
                controlnet_cond,
            )
        gamma = self.settings.min_snr_gamma
        weights = torch.ones(len(batch.timesteps), device=model_pred.device)
        if gamma is not None:
            weights = min_snr_weights(self._alphas_cumprod, batch.timesteps, gamma, self.prediction_type)
        return PredictionStep(
            latents=batch.latents,
            noise=batch.noise,
            timesteps=batch.timesteps,
            alphas_cumprod=self._alphas_cumprod,
            prediction_type=self.prediction_type,
            model_pred=model_pred.float(),
            timestep_weights=weights,
            masks=batch.masks,
        )

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Unweighted noise-prediction error of the averaged weights on the fixed held-out inputs; rank 0 only."""
        if self.validation is None:
            return {}
        self.denoiser.eval()
        size = max(1, self.settings.batch_size // self.settings.gradient_accumulation_steps)
        losses = []
        with self.averaged():
            for start in range(0, len(self.validation.latents), size):
                part = self.validation.slice(start, start + size).to(self.world.device)
                step = self._denoise(self.denoiser, part)
                losses.append((step.model_pred - step.target()).square().mean(dim=(1, 2, 3)))
        return {"val_loss": torch.cat(losses).mean().item()}

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The denoiser holds the averaged weights inside the block, in evaluation mode."""
        self.denoiser.eval()
        with self.ema.applied():
            yield

    def finish(self) -> None:
        """Leaves the averaged weights in the denoiser, for saving."""
        self.ema.copy_to_parameters()
        self.denoiser.eval()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Trained parameters and their averages, by name."""
        return {"trainable": dict(self.parameters), "ema": self.ema.tensors()}

    def state_dict(self) -> dict[str, Any]:
        """Optimizer state and counters: tensors and plain values."""
        return {"optimizer": self.optimizer.state_dict(), "ema_updates": self.ema.num_updates}

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Restores `tensors()` and `state_dict()` exactly.

        Raises:
            ValueError: the parameters are not the same ones.
        """
        saved = tensors["trainable"]
        different = sorted(set(saved) ^ set(self.parameters))
        if different:
            raise ValueError(
                f"checkpoint: {len(different)} trained parameters differ from this run's, first {different[0]}"
            )
        with torch.no_grad():
            for name, value in saved.items():
                self.parameters[name].copy_(value)
        self.ema.load(tensors["ema"], int(state["ema_updates"]))
        self.optimizer.load_state_dict(state["optimizer"])


def uses_bf16(settings: TrainingSettings, device: str) -> bool:
    """Whether the denoiser runs under bf16 autocast on `device`."""
    if settings.mixed_precision == "auto":
        return torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported()
    return settings.mixed_precision == "bf16"
