"""The denoising loop: from noise to latents, one image per random generator."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

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
    prompt_embeds: Tensor,
    null_embeds: Tensor | None,
    controlnet_cond: Tensor | None,
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
        denoiser: `(latents, timesteps (B,), prompt_embeds, controlnet_cond) -> prediction`.
        noise_scheduler: a diffusers inference schedule; its timesteps are set here.
        latents: (B, C, h, w) standard normal noise.
        prompt_embeds: (B, L, D).
        null_embeds: (1, L, D) or (B, L, D); may be None where guidance_scale is 1.
        controlnet_cond: (B, K, R, R), or None.
        num_inference_steps, guidance_scale, guidance_start, guidance_stop, eta: see `Sampling`.
        guidances: hooks, applied in order.
        rngs: one per image, for all noise drawn inside the loop.

    Raises:
        ValueError: guidance without null_embeds, or another number of rngs than images.
    """
    batch = latents.shape[0]
    if rngs and len(rngs) != batch:
        raise ValueError(f"rngs: want one per image, got {len(rngs)} for {batch}")
    if (eta or guidances) and not rngs:
        raise ValueError("rngs: needed where the loop draws noise (eta or guidances)")
    guided = guidance_scale != 1.0 and guidance_start < guidance_stop
    if guided and null_embeds is None:
        raise ValueError(f"null_embeds: needed for guidance_scale={guidance_scale}")
    embeds_of_both, cond_of_both = prompt_embeds, controlnet_cond
    if guided and null_embeds is not None:
        embeds_of_both = torch.cat([null_embeds.expand_as(prompt_embeds), prompt_embeds])
        cond_of_both = None if controlnet_cond is None else torch.cat([controlnet_cond, controlnet_cond])

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
        )
        active = [g for g in guidances if is_active(g.start, g.stop, step.fraction)]
        for guidance in active:
            latents = guidance.before_step(latents, step)
        inputs = noise_scheduler.scale_model_input(latents, timestep).to(prompt_embeds.dtype)
        if guided and is_active(guidance_start, guidance_stop, step.fraction):
            both = torch.cat([inputs, inputs])
            prediction = denoiser(both, timestep.expand(2 * batch), embeds_of_both, cond_of_both).float()
            unconditional, conditional = prediction.chunk(2)
            prediction = unconditional + guidance_scale * (conditional - unconditional)
        else:
            prediction = denoiser(inputs, timestep.expand(batch), prompt_embeds, controlnet_cond).float()
        latents = noise_scheduler.step(prediction, timestep, latents, return_dict=False, **step_arguments)[0]
        for guidance in active:
            latents = guidance.after_step(latents, step)
    return latents
