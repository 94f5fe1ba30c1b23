"""What learns: a learner owns its module, optimizer and moving average, and takes one step at a time.

The loop knows a learner only by `draw(shard) -> batch`, `step(batch) -> metrics`, `validate() -> metrics`,
`averaged()`, `tensors()`, `state_dict()`, `load(tensors, state)` and `finish()`, so a learner with two
optimizers, or one that is no diffusion model, runs in the same loop.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from factory.diffusion.conditions import Conditions
from factory.training.averaged_learner import AveragedLearner
from factory.training.bound_objective import ObservedDenoiser
from factory.training.examples import DiffusionBatch, Examples
from factory.training.mixture import Shard
from factory.training.objectives import (
    PREDICTION_TYPES,
    Objective,
    PredictionStep,
    TrainingContext,
    add_noise,
    min_snr_weights,
)
from factory.training.settings import TrainingSettings
from factory.training.world import World
from schemas.identity import torch_seed


class DiffusionLearner(AveragedLearner):
    """Trains a denoiser's trainable parameters on cached latents.

    Args:
        denoiser: `forward(latents, timesteps, **conditions.arguments())`, on the world's device, fp32.
        examples: training rows.
        prompt_embeds: the prompt table, float (P, L, D); row 0 is the null prompt.
        conditions: prompt embeddings (b, L, D), and by keyword `masks`, `labels` and `masked_latents` of a batch → what
            goes into the denoiser, as `LoadedGenerator.conditions`.
        alphas_cumprod: ᾱ of the noise scheduler, float (T,).
        prediction_type: "epsilon" or "v_prediction".
        objectives: summed with their weights; no two of one kind.
        context: what they may know; None where none of them asks.
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
        conditions: Callable[..., Conditions],
        alphas_cumprod: Tensor,
        prediction_type: str,
        objectives: Sequence[Objective],
        settings: TrainingSettings,
        world: World,
        context: TrainingContext | None = None,
        validation: DiffusionBatch | None = None,
    ) -> None:
        assert prediction_type in PREDICTION_TYPES, prediction_type
        self.world = world
        self.examples, self.validation = examples, validation
        self.prediction_type = prediction_type
        self._conditions = conditions
        self._prompt_embeds = prompt_embeds.to(world.device)
        self._alphas_cumprod = alphas_cumprod.to(world.device, torch.float32)
        on_cuda = torch.device(world.device).type == "cuda"
        channels_last = on_cuda if settings.channels_last is None else settings.channels_last
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        if channels_last:
            denoiser.to(memory_format=torch.channels_last)
        self._autocast = uses_bf16(settings, world.device)
        self.denoiser = denoiser
        self._weights = {type(o).__name__: o.weight for o in objectives}
        if len(self._weights) < len(objectives):
            raise ValueError(f"objectives: two of one kind among {[type(o).__name__ for o in objectives]}")
        bound = {type(o).__name__: o.bind(context) for o in objectives}  # type: ignore[arg-type]
        self._observed = ObservedDenoiser(denoiser, bound).to(world.device)
        self._bound = bound
        parameters = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
        if not parameters:
            raise ValueError("denoiser: no parameter requires a gradient, nothing would be trained")
        parameters |= {
            f"objectives.{name}": p
            for name, p in self._observed.objectives.named_parameters()
            if p.requires_grad
        }
        optimizer = torch.optim.AdamW(
            list(parameters.values()),
            lr=settings.learning_rate,
            betas=settings.adam_betas,
            weight_decay=settings.weight_decay,
            fused=on_cuda or None,
        )
        super().__init__(
            network=denoiser, parameters=parameters, optimizers={"main": optimizer}, settings=settings
        )
        self._ddp = world.prepare(self._observed)
        self._model: Callable[..., tuple[Tensor, dict[str, Any]]] = (
            torch.compile(self._ddp) if settings.compile else self._ddp
        )

    def draw(self, shard: Shard) -> DiffusionBatch:
        """Inputs on the CPU; a pure function, safe to call in a thread."""
        return self.examples.draw(shard)

    def step(self, batch: DiffusionBatch) -> dict[str, Tensor]:
        """One optimizer update from this process's share of a global batch. Returns scalars on the device."""
        self._observed.train()
        self.set_learning_rate(batch.step)
        # Dropout inside a module, where there is any, is a function of (seed, step) too.
        torch.manual_seed(torch_seed(f"training/{self.settings.seed}/{batch.step}", "modules"))
        parts = batch.to(self.world.device).split(self.settings.gradient_accumulation_steps)
        return self.descend(self._ddp, parts, lambda part: self._losses(self._model, part))

    def _losses(self, model: Callable[..., Any], batch: DiffusionBatch) -> dict[str, Tensor]:
        """Loss of each image, (b,): "loss" is the weighted sum; each objective also by name if there are several."""
        step, outputs = self._denoise(model, batch)
        terms = {name: bound.loss(step, outputs[name]) for name, bound in self._bound.items()}
        losses = {
            "loss": torch.stack([self._weights[name] * term for name, term in terms.items()]).sum(dim=0)
        }
        if len(terms) > 1:
            losses |= terms
        for name, bound in self._bound.items():
            losses |= bound.metrics(step, outputs[name])
        return losses

    def _denoise(
        self, model: Callable[..., Any], batch: DiffusionBatch
    ) -> tuple[PredictionStep, dict[str, Any]]:
        conditions = self._conditions(
            self._prompt_embeds[batch.prompts],
            masks=batch.masks,
            labels=batch.labels,
            masked_latents=batch.masked_latents,
        )
        noisy = add_noise(batch.latents, batch.noise, self._alphas_cumprod[batch.timesteps])
        with torch.autocast(torch.device(self.world.device).type, torch.bfloat16, enabled=self._autocast):
            model_pred, outputs = model(
                noisy.contiguous(memory_format=self._memory_format), batch.timesteps, conditions.arguments()
            )
        gamma = self.settings.min_snr_gamma
        weights = torch.ones(len(batch.timesteps), device=model_pred.device)
        if gamma is not None:
            weights = min_snr_weights(self._alphas_cumprod, batch.timesteps, gamma, self.prediction_type)
        step = PredictionStep(
            latents=batch.latents,
            noise=batch.noise,
            timesteps=batch.timesteps,
            alphas_cumprod=self._alphas_cumprod,
            prediction_type=self.prediction_type,
            model_pred=model_pred.float(),
            timestep_weights=weights,
            masks=batch.masks,
            labels=batch.labels,
            prompts=batch.prompts,
            extras=batch.extras,
        )
        return step, outputs

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """On the fixed held-out inputs with the averaged weights; rank 0 only.

        "val_loss" is the unweighted noise-prediction error; each objective by name where there are others.
        """
        if self.validation is None:
            return {}
        self._observed.eval()
        size = max(1, self.settings.batch_size // self.settings.gradient_accumulation_steps)
        found: dict[str, list[Tensor]] = {}
        with self.averaged():
            for start in range(0, len(self.validation.latents), size):
                part = self.validation.slice(start, start + size).to(self.world.device)
                step, outputs = self._denoise(self._observed, part)
                values = {"val_loss": (step.model_pred - step.target()).square().mean(dim=(1, 2, 3))}
                if set(self._bound) != {"NoisePrediction"}:
                    for name, bound in self._bound.items():
                        values[f"val_{name}"] = bound.loss(step, outputs[name])
                        values |= {f"val_{k}": v for k, v in bound.metrics(step, outputs[name]).items()}
                for name, value in values.items():
                    found.setdefault(name, []).append(value)
        return {name: torch.cat(parts).mean().item() for name, parts in found.items()}


def uses_bf16(settings: TrainingSettings, device: str) -> bool:
    """Whether the denoiser runs under bf16 autocast on `device`."""
    if settings.mixed_precision == "auto":
        return torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported()
    return settings.mixed_precision == "bf16"
