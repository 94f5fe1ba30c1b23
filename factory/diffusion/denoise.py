"""The denoising loop: from noise to latents, one image per random generator."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from factory.diffusion.conditions import Conditions
from factory.diffusion.guidance import DenoisingStep, Guidance, is_active
from factory.diffusion.sampling import Sampling


def make_noise_scheduler(sampling: Sampling, training_config: Mapping[str, Any]) -> Any:
    """A fresh diffusers schedule for inference over the base's training schedule.

    Fresh for every batch, since multi-step solvers remember earlier predictions.
    """
    from diffusers import (
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        UniPCMultistepScheduler,
    )

    config = dict(training_config)
    if sampling.noise_scheduler == "ddim":
        return DDIMScheduler.from_config(config)
    if sampling.noise_scheduler == "dpmpp_2m":
        return DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++", solver_order=2)
    if sampling.noise_scheduler == "unipc":
        return UniPCMultistepScheduler.from_config(config)
    return EulerDiscreteScheduler.from_config(config)


@torch.no_grad()
def denoise(
    denoiser: nn.Module,
    noise_scheduler: Any,
    latents: Tensor,
    conditions: Conditions,
    null_conditions: Conditions | None,
    *,
    num_inference_steps: int,
    guidance_scale: float,
    guidance_start: float = 0.0,
    guidance_stop: float = 1.0,
    eta: float = 0.0,
    guidances: Sequence[Guidance] = (),
    rngs: Sequence[torch.Generator] = (),
) -> Tensor:
    """Denoised latents (B, C, h, w), float32.

    The state stays in float32 whatever the model's precision; classifier-free guidance runs both sides in one
    call of twice the batch, and only while it is on.

    Args:
        denoiser: `(latents, timesteps (B,), **conditions.arguments()) -> prediction`.
        noise_scheduler: a diffusers inference schedule; its timesteps are set here.
        latents: (B, C, h, w) standard normal noise.
        conditions: of the B images.
        null_conditions: of the unconditional side, for B images; may be None where guidance_scale is 1.
        num_inference_steps, guidance_scale, guidance_start, guidance_stop, eta: see `Sampling`.
        guidances: hooks, applied in order.
        rngs: one per image, for all noise drawn inside the loop.

    Raises:
        ValueError: guidance without null_conditions, or another number of rngs than images.
    """
    batch = latents.shape[0]
    if rngs and len(rngs) != batch:
        raise ValueError(f"rngs: want one per image, got {len(rngs)} for {batch}")
    if (eta or guidances) and not rngs:
        raise ValueError("rngs: needed where the loop draws noise (eta or guidances)")
    guided = guidance_scale != 1.0 and guidance_start < guidance_stop
    if guided and null_conditions is None:
        raise ValueError(f"null_conditions: needed for guidance_scale={guidance_scale}")
    one_side = conditions.arguments()
    both_sides = one_side if null_conditions is None else null_conditions.then(conditions).arguments()

    noise_scheduler.set_timesteps(num_inference_steps, device=latents.device)
    timesteps = noise_scheduler.timesteps
    step_arguments = {"eta": eta, "generator": list(rngs)} if eta else {}
    latents = latents.float() * noise_scheduler.init_noise_sigma
    for index, timestep in enumerate(timesteps):
        step = DenoisingStep(
            index=index,
            num_steps=len(timesteps),
            timestep=timestep,
            next_timestep=timesteps[index + 1] if index + 1 < len(timesteps) else None,
            noise_scheduler=noise_scheduler,
            rngs=rngs,
            is_guided=guided and is_active(guidance_start, guidance_stop, index / len(timesteps)),
        )
        active = [g for g in guidances if is_active(g.start, g.stop, step.fraction)]
        for guidance in active:
            latents = guidance.before_step(latents, step)
        inputs = noise_scheduler.scale_model_input(latents, timestep).to(conditions.prompt_embeds.dtype)
        if step.is_guided:
            both = torch.cat([inputs, inputs])
            prediction = denoiser(both, timestep.expand(2 * batch), **both_sides).float()
            unconditional, conditional = prediction.chunk(2)
            prediction = unconditional + guidance_scale * (conditional - unconditional)
        else:
            prediction = denoiser(inputs, timestep.expand(batch), **one_side).float()
        latents = noise_scheduler.step(prediction, timestep, latents, return_dict=False, **step_arguments)[0]
        for guidance in active:
            latents = guidance.after_step(latents, step)
    return latents
