"""Learners of the mask models: the semantic-curvature GAN with its two optimizers, and the mask DDPM.

They keep the protocol of `loop.Learner`. Every draw (mirroring, z, target curvature, timestep, noise) is a function
of (seed, step, position), so a resumed run takes the same steps.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from factory.generators.mask_curvature import curvature
from factory.generators.mask_diffusion_model import MaskDenoiser, ddpm_scheduler
from factory.generators.mask_gan import MaskGAN
from factory.generators.mask_gan_model import (
    Judgement,
    MaskDiscriminator,
    MaskGenerator,
    box_iou,
    box_maps,
)
from factory.training.averaged_learner import AveragedLearner
from factory.training.mask_batches import (
    MEASURED_AT_ONCE,
    LesionDraws,
    Lesions,
    MaskBatch,
    as_grey_levels,
    as_judged,
)
from factory.training.mixture import Shard
from factory.training.settings import TrainingSettings
from factory.training.world import World


def _adam(
    parameters: Mapping[str, Tensor], learning_rate: float, settings: TrainingSettings
) -> torch.optim.Adam:
    return torch.optim.Adam(list(parameters.values()), lr=learning_rate, betas=settings.adam_betas)


class MaskGANLearner(AveragedLearner):
    """Trains generator and discriminator in turn: one update of each per step (Pan et al. 2025, Eq. 12–16).

    One process only: curvatures are paired by rank over the whole batch.

    Args:
        model: networks and losses.
        lesions: training masks at the model's resolution.
        settings: optimisation; of the generator's network where the two differ.
        world: its device.
        held_out: validation masks, or None.
        networks: generator and discriminator, fresh; `train_part` seeds them.
    """

    def __init__(
        self,
        *,
        model: MaskGAN,
        lesions: Lesions,
        settings: TrainingSettings,
        world: World,
        networks: tuple[MaskGenerator, MaskDiscriminator],
        held_out: Lesions | None = None,
    ) -> None:
        assert world.size == 1
        self.model, self.world = model, world
        self.classes = lesions.classes
        self.generator, self.discriminator = (network.to(world.device) for network in networks)
        curvatures = lesions.curvatures(model) if model.curvature_weight else {}
        self._draws = LesionDraws(lesions, settings, (model.noise_dim,), curvatures, 1)
        self._fixed = None
        if held_out is not None and len(held_out.masks):
            others = LesionDraws(held_out, settings, (model.noise_dim,), {}, 1)
            self._fixed = others.fixed(np.arange(len(held_out.masks)))
        generator = dict(self.generator.named_parameters())
        discriminator = dict(self.discriminator.named_parameters())
        parameters = {f"generator.{name}": p for name, p in generator.items()}
        parameters |= {f"discriminator.{name}": p for name, p in discriminator.items()}
        super().__init__(
            network=self.generator,
            parameters=parameters,
            averaged=generator,
            optimizers={
                "main": _adam(generator, settings.learning_rate, settings),
                "discriminator": _adam(discriminator, model.discriminator_learning_rate, settings),
            },
            settings=settings,
        )

    def draw(self, shard: Shard) -> MaskBatch:
        """Inputs on the CPU; a pure function, safe to call in a thread."""
        return self._draws.draw(shard)

    def step(self, batch: MaskBatch) -> dict[str, Tensor]:
        """One update of the discriminator, then one of the generator. Returns scalars on the device."""
        self.generator.train()
        self.set_learning_rate(batch.step)
        batch = batch.to(self.world.device)
        maps = box_maps(batch.boxes, self.model.resolution)
        drawn = self.generator(batch.noise, batch.labels, maps)
        terms = self._discriminator_terms(batch, maps, drawn.detach())
        norm = self._update("discriminator", terms["loss_discriminator"], self.discriminator)
        self.discriminator.requires_grad_(False)
        generator_terms = self._generator_terms(batch, maps, drawn)
        self.discriminator.requires_grad_(True)
        terms |= generator_terms
        terms["grad_norm"] = self._update("main", terms["loss"], self.generator)
        terms["grad_norm_discriminator"] = norm
        self.ema.update()
        return {name: value.detach() for name, value in terms.items()}

    def _update(self, name: str, loss: Tensor, network: nn.Module) -> Tensor:
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), self.settings.max_grad_norm)
        optimizer.step()
        return norm

    def _judge(self, masks: Tensor, batch: MaskBatch, maps: Tensor) -> Judgement:
        return self.discriminator(as_judged(masks, self.model), batch.labels, maps)

    def _discriminator_terms(self, batch: MaskBatch, maps: Tensor, drawn: Tensor) -> dict[str, Tensor]:
        """Eq. 12, and a classifier's cross-entropy: on real masks, or on generated ones (Eq. 14)."""
        real, made = self._judge(batch.masks, batch, maps), self._judge(drawn, batch, maps)
        loss = 0.5 * (functional.softplus(-real.realness) + functional.softplus(made.realness)).mean()
        terms = {"real_logit": real.realness.mean(), "drawn_logit": made.realness.mean()}
        logits = made.class_logits if self.model.class_term == "paper" else real.class_logits
        if logits is not None:
            terms["loss_classifier"] = functional.cross_entropy(logits, batch.labels)
            loss = loss + self.model.class_weight * terms["loss_classifier"]
        return {"loss_discriminator": loss, **terms}

    def _generator_terms(self, batch: MaskBatch, maps: Tensor, drawn: Tensor) -> dict[str, Tensor]:
        """Eq. 13 and 11, and the terms for class and rectangle that Eq. 15 lacks."""
        model = self.model
        made = self._judge(drawn, batch, maps)
        terms = {"loss_adversarial": functional.softplus(-made.realness).mean()}
        loss = terms["loss_adversarial"]
        if model.class_term == "acgan":
            assert made.class_logits is not None
            terms["loss_class"] = functional.cross_entropy(made.class_logits, batch.labels)
            loss = loss + model.class_weight * terms["loss_class"]
        if model.curvature_weight:
            terms["loss_curvature"] = self._curvature_loss(batch, drawn)
            loss = loss + model.curvature_weight * terms["loss_curvature"]
        iou = box_iou(drawn, batch.boxes).mean()
        terms["box_iou"] = iou
        if model.box_weight:
            loss = loss + model.box_weight * (1 - iou)
        return {"loss": loss, **terms}

    def _curvature_loss(self, batch: MaskBatch, drawn: Tensor) -> Tensor:
        """Eq. 11: mean |κ̄ - κ*|, paired by rank within each class or item by item."""
        found = curvature(as_judged(drawn[:, 0], self.model), operator=self.model.operator)
        return curvature_distance(found, batch.curvatures, batch.labels, self.model.curvature_pairing)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Of masks for the held-out rectangles, averaged weights: box IoU, ripples, curvature by class."""
        if self._fixed is None:
            return {}
        with self.averaged():
            masks = self._draw_fixed(self._fixed)
        hard = (masks > 0.5).float()
        measured = curvature(hard[:, 0]), curvature(masks[:, 0])
        boxes, labels = self._fixed.boxes, self._fixed.labels
        values = {
            "val_box_iou": box_iou(hard, boxes).mean().item(),
            "val_ripple": (measured[0] - measured[1]).abs().mean().item(),
        }
        for number, name in enumerate(self.classes):
            if (labels == number).any():
                values[f"val_curvature_{name}"] = measured[0][labels == number].mean().item()
        return values

    def _draw_fixed(self, batch: MaskBatch) -> Tensor:
        """Soft masks on the CPU, float (n, 1, R, R)."""
        parts = []
        for start in range(0, len(batch.masks), MEASURED_AT_ONCE):
            here = slice(start, start + MEASURED_AT_ONCE)
            maps = box_maps(batch.boxes[here], self.model.resolution)
            inputs = (batch.noise[here], batch.labels[here], maps)
            parts.append(self.generator(*(value.to(self.world.device) for value in inputs)).cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def previews(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """At most `count` held-out masks and drawn ones for their rectangles, uint8 (n, R, R) each, 0 … 255."""
        assert self._fixed is not None
        fixed = self._fixed.first(count)
        return as_grey_levels(fixed.masks), as_grey_levels(self._draw_fixed(fixed))


def curvature_distance(found: Tensor, targets: Tensor, labels: Tensor, pairing: str) -> Tensor:
    """Mean |κ̄ - κ*| of B masks, all float (B,), labels int64 (B,).

    "rank" sorts both within each class first: the 1-Wasserstein distance of the two samples. "item" is Eq. 11.
    """
    if pairing == "item":
        return (found - targets).abs().mean()
    distances = []
    for label in labels.unique():
        here = labels == label
        distances.append((found[here].sort().values - targets[here].sort().values).abs())
    return torch.cat(distances).mean()


class MaskDDPMLearner(AveragedLearner):
    """Trains the mask DDPM: mean squared error of the predicted noise.

    Args:
        denoiser: fresh; `train_part` seeds it.
        lesions: training masks at the model's resolution.
        settings: optimisation.
        world: the processes that train together.
        held_out: validation masks, or None.
    """

    def __init__(
        self,
        *,
        denoiser: MaskDenoiser,
        lesions: Lesions,
        settings: TrainingSettings,
        world: World,
        held_out: Lesions | None = None,
    ) -> None:
        self.denoiser, self.world = denoiser.to(world.device), world
        noise_scheduler: Any = ddpm_scheduler(denoiser.model)
        self._alphas_cumprod = noise_scheduler.alphas_cumprod.to(world.device)
        num_timesteps = denoiser.model.num_train_timesteps
        shape = (1, denoiser.model.resolution, denoiser.model.resolution)
        self._draws = LesionDraws(lesions, settings, shape, {}, num_timesteps)
        self._fixed = None
        if held_out is not None and len(held_out.masks):
            self._fixed = LesionDraws(held_out, settings, shape, {}, num_timesteps).fixed(
                np.arange(len(held_out.masks))
            )
        parameters = dict(denoiser.named_parameters())
        super().__init__(
            network=denoiser,
            parameters=parameters,
            optimizers={"main": _adam(parameters, settings.learning_rate, settings)},
            settings=settings,
        )
        self._model = world.prepare(self.denoiser)

    def draw(self, shard: Shard) -> MaskBatch:
        """Inputs on the CPU; a pure function, safe to call in a thread."""
        return self._draws.draw(shard)

    def step(self, batch: MaskBatch) -> dict[str, Tensor]:
        """One update from this process's share of a batch. Returns scalars on the device."""
        self.denoiser.train()
        self.set_learning_rate(batch.step)
        parts = [batch.to(self.world.device)]
        return self.descend(self._model, parts, lambda part: {"loss": self._losses(self._model, part)})

    def _losses(self, model: nn.Module, batch: MaskBatch) -> Tensor:
        """Squared error of each mask's noise, (b,)."""
        level = self._alphas_cumprod[batch.timesteps][:, None, None, None]
        noisy = level.sqrt() * (2 * batch.masks - 1) + (1 - level).sqrt() * batch.noise
        return (model(noisy, batch.timesteps, batch.labels) - batch.noise).square().mean(dim=(1, 2, 3))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The loss on held-out masks with fixed noise, averaged weights."""
        if self._fixed is None:
            return {}
        with self.averaged():
            loss = self._losses(self.denoiser, self._fixed.to(self.world.device)).mean()
        return {"val_loss": loss.item()}

    @torch.no_grad()
    def previews(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """At most `count` held-out masks and drawn ones of their classes, uint8 (n, R, R) each, 0 … 255."""
        assert self._fixed is not None
        fixed = self._fixed.first(count).to(self.world.device)
        return as_grey_levels(fixed.masks), as_grey_levels(self.denoiser.draw(fixed.noise, fixed.labels))
