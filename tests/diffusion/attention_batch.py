"""A narrow random UNet and a batch over it, for tests of what looks into attention."""

from collections.abc import Sequence

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from factory.diffusion.conditions import Conditions
from factory.diffusion.guidance import DenoisingBatch, DenoisingStep
from factory.generators.loaded import Denoiser

torch.set_num_threads(1)  # layers this small are slower on several

NUM_TOKENS, WIDTH, LATENT_SIDE = 10, 8, 8
WORDS = {"<lesion>": [2], "<skin>": [3, 4], "absent": []}


def make_unet(seed: int = 0) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=2,
        out_channels=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=4,
        cross_attention_dim=WIDTH,
    )
    with torch.no_grad():  # peaked attention, so that there is something to guide
        for name, parameter in unet.named_parameters():
            if name.endswith(("to_q.weight", "to_k.weight")):
                parameter.mul_(4.0)
    return unet.eval()


def disk_masks(count: int, resolution: int = 32) -> Tensor:
    ys, xs = torch.meshgrid(torch.arange(resolution), torch.arange(resolution), indexing="ij")
    masks = [(ys - 10 - i) ** 2 + (xs - 12) ** 2 < (6 + i) ** 2 for i in range(count)]
    return torch.stack(masks).to(torch.uint8)


def make_batch(
    unet: UNet2DConditionModel,
    count: int,
    masks: Tensor | None = None,
    num_tokens: Sequence[int] | None = None,
) -> DenoisingBatch:
    rng = torch.Generator().manual_seed(3)
    embeds = torch.randn((8, NUM_TOKENS, WIDTH), generator=rng)[:count]
    return DenoisingBatch(
        denoiser=Denoiser(unet, None),
        conditions=Conditions(prompt_embeds=embeds),
        prompts=[f"prompt {i}" for i in range(count)],
        token_positions=lambda word: [list(WORDS[word]) for _ in range(count)],
        num_tokens=num_tokens or [8] * count,
        masks=disk_masks(count) if masks is None else masks,
        backgrounds=None,
        resolution=32,
    )


def make_latents(count: int) -> Tensor:
    return torch.randn((8, 2, LATENT_SIDE, LATENT_SIDE), generator=torch.Generator().manual_seed(4))[:count]


def make_step(index: int = 0, num_steps: int = 10) -> DenoisingStep:
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(num_steps)
    return DenoisingStep(
        index=index,
        num_steps=num_steps,
        timestep=scheduler.timesteps[index],
        next_timestep=scheduler.timesteps[index + 1] if index + 1 < num_steps else None,
        noise_scheduler=scheduler,
        rngs=(),
    )
