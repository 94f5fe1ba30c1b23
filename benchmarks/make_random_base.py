"""Write a base checkpoint of random weights, for benchmarks and tests that need a shape and no pictures.

    python benchmarks/make_random_base.py --shape sd15 --out runs/random_sd15
    python benchmarks/make_random_base.py --shape tiny --out runs/random_tiny

The folder has diffusers layout (vae, unet, text_encoder, tokenizer, scheduler) and loads as any base does.
Nothing is downloaded: the tokenizer is made here.
"""

import argparse
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=("tiny", "sd15"), default="tiny")
    parser.add_argument("--out", type=Path, required=True, help="empty or absent folder")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    import torch

    from factory.assets.base_models import write_random_base

    start = time.perf_counter()
    write_random_base(args.out, args.shape, dtype=getattr(torch, args.dtype), seed=args.seed)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"wrote {args.out} ({size / 1e6:.1f} MB) in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
