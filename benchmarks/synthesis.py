"""Our denoising path against the stock diffusers ControlNet pipeline: same weights, scheduler, steps, size.

    python benchmarks/synthesis.py                              # tiny width, CPU, about a minute
    python benchmarks/synthesis.py --width sd15 --device cuda   # SD-1.5 width, random weights, GPU

Both sides make the same images from the same noise (checked), in turn, in one process. Ours runs as the
factory runs it: a prompt is encoded once per distinct text, the mask encoder once per batch, pixels become
uint8 on the device. The stock pipeline is called as its documentation shows, on the same batch.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from measure import interleaved, median, peak_memory_mb, save

PROMPT = "breast ultrasound image of {} tumor with {} echogenicity and {} boundary."


def requests_for(plan, count: int, resolution: int) -> list:
    """Deterministic requests: eight distinct prompts, elliptical masks."""
    from factory.synthesis.synthesizer import PreparedRequest

    grid_y, grid_x = np.mgrid[:resolution, :resolution] / resolution
    made = []
    for ordinal in range(count):
        label = plan.labels[ordinal % 2]
        texture = ("homogeneous", "heterogeneous")[ordinal // 2 % 2]
        boundary = ("clear", "unclear")[ordinal // 4 % 2]
        width, height = 0.1 + 0.02 * (ordinal % 5), 0.08 + 0.01 * (ordinal % 7)
        mask = ((grid_x - 0.5) / width) ** 2 + ((grid_y - 0.45) / height) ** 2 <= 1
        made.append(
            PreparedRequest(
                request=plan.request(label, ordinal),
                requested_mask=mask.astype(np.uint8),
                prompt=PROMPT.format(label, texture, boundary),
            )
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", choices=("tiny", "sd15"), default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--num-inference-steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    import torch
    from diffusers import DDIMScheduler, StableDiffusionControlNetPipeline

    from factory.diffusion.sampling import Sampling
    from factory.generators.conditioning import TextAndMask
    from factory.generators.latent_diffusion import LatentDiffusion, Trainable
    from factory.synthesis.annotators import RequestedMask
    from factory.synthesis.synthesizer import Synthesizer
    from schemas.request import SynthesisPlan

    torch.set_num_threads(args.threads)
    on_gpu = args.device.startswith("cuda")
    dtype = "bfloat16" if on_gpu else "float32"
    with tempfile.TemporaryDirectory() as folder:
        base, resolution = "tiny", 128
        if args.width == "sd15":
            from factory.assets.base_models import write_random_base

            base, resolution = str(Path(folder) / "base"), 512
            write_random_base(Path(base), "sd15", dtype=torch.float16, seed=0)
        generator = LatentDiffusion(
            base=base,
            conditioning=TextAndMask(),
            trainable=Trainable(unet="frozen", controlnet=True),
            resolution=resolution,
        )
        sampling = Sampling(
            noise_scheduler="ddim", num_inference_steps=args.num_inference_steps, guidance_scale=3.0
        )
        plan = SynthesisPlan(
            recipe="bench", fingerprint="bench", weights={}, real_digest="", labels=("benign", "malignant")
        )
        requests = requests_for(plan, args.batch_size, resolution)
        ours = Synthesizer(
            generator,
            None,
            sampling,
            (),
            RequestedMask(),
            batch_size=args.batch_size,
            device=args.device,
            dtype=dtype,
            compile=args.compile,
        )
        stock_parts = generator.load(None, device=args.device, dtype=dtype)
        pipe = StableDiffusionControlNetPipeline(
            vae=stock_parts.vae,
            text_encoder=stock_parts.text_encoder,
            tokenizer=stock_parts.tokenizer,
            unet=stock_parts.unet,
            controlnet=stock_parts.controlnet,
            scheduler=DDIMScheduler.from_config(stock_parts.noise_scheduler.config, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        noise = torch.stack([ours.noise(item.request.request_id) for item in requests])
        masks = np.stack([item.requested_mask for item in requests])
        conditions = torch.from_numpy(masks)[:, None].float()
        torch_dtype = getattr(torch, dtype)

        def run_stock() -> np.ndarray:
            with torch.inference_mode():
                return pipe(
                    prompt=[item.prompt for item in requests],
                    image=conditions.to(args.device, torch_dtype),
                    latents=noise.to(args.device, torch_dtype),
                    height=resolution,
                    width=resolution,
                    num_inference_steps=args.num_inference_steps,
                    guidance_scale=3.0,
                    output_type="np",
                ).images

        def run_ours() -> np.ndarray:
            return np.stack([item.image for item in ours.synthesize(requests)])

        grey_stock = (run_stock().mean(axis=3) * 255).round()
        difference = float(np.abs(grey_stock - run_ours()).mean())
        times = interleaved({"ours": run_ours, "stock": run_stock}, args.rounds, args.device)
    rates = {name: args.batch_size / median(values) for name, values in times.items()}
    results = {
        "images_per_second": rates,
        "ratio_ours_over_stock": rates["ours"] / rates["stock"],
        "mean_absolute_difference_grey_levels": difference,
        "peak_memory_mb_both": peak_memory_mb(args.device),
    }
    path = save("synthesis", vars(args) | {"dtype": dtype, "resolution": resolution}, results, args.device)
    print(
        f"ours {rates['ours']:.2f} images/s, stock {rates['stock']:.2f} images/s: ratio {rates['ours'] / rates['stock']:.2f}"
    )
    print(f"mean |difference| of the images {difference:.3f} grey levels; wrote {path}")


if __name__ == "__main__":
    main()
