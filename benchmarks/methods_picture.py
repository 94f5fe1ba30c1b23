"""The same requests through every method at tiny size: the picture of docs/methods.md.

    python benchmarks/methods_picture.py --out docs/methods.png        # about twelve minutes on one core

Trains each `*_tiny` recipe (and what it needs: captions, mask GAN, autoencoder) on phantoms, then gives all of them the
same six masks, classes and noise seeds. The pictures show that every path works and what each method does with a
mask; at this width they say nothing about the image quality of the published sizes.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from phantom_tables import write_phantoms
from PIL import Image, ImageDraw

METHODS = ("sketch_ldm_tiny", "tiny", "didgen_tiny", "scmg_tiny", "meddiff_ft_tiny")
NAMES = {"tiny": "clinical_prior_tiny"}
CELL, LEFT = 128, 150


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="docs/methods.png")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--num-images", type=int, default=160)
    parser.add_argument("--columns", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    import torch

    from factory.datasets.phantom import BENIGN, MALIGNANT, NORMAL, PhantomConfig
    from factory.imaging import decode_rows
    from factory.storage import real_rows

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = PhantomConfig(size=128, classes=(BENIGN, MALIGNANT, NORMAL))
        real = write_phantoms(folder / "real.lance", config, {"train": args.num_images, "val": 24})
        held_out = decode_rows(real_rows(real, splits=("val",)), 128)
        lesions = [row for row in held_out if row.mask is not None and row.mask.any()]
        asked = [
            row
            for pair in zip(
                [row for row in lesions if row.label_name == "benign"],
                [row for row in lesions if row.label_name == "malignant"],
            )
            for row in pair
        ][: args.columns]
        rows: list[tuple[str, list[np.ndarray]]] = [
            ("held-out real", [row.image for row in asked]),
            ("requested mask", [255 * row.mask for row in asked if row.mask is not None]),
        ]
        for method in METHODS:
            begin = time.perf_counter()
            images, masks = run_method(method, real, folder / method, asked, args.steps)
            print(f"{method}: {time.perf_counter() - begin:.0f} s", flush=True)
            rows.append((NAMES.get(method, method), images))
            if method == "didgen_tiny":
                rows.append(("mask read off attention", masks))
    draw(rows).save(args.out)
    print(f"wrote {args.out}")


def run_method(
    method: str, real: str, folder: Path, asked: list[Any], steps: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Images, and label masks ×255, of one method for the requests; trained first."""
    from factory.imaging import decode_rows
    from factory.storage import open_table, real_rows
    from factory.synthesis.synthesizer import PreparedRequest, Synthesizer
    from factory.training.run import train_generator
    from factory.training.task import TrainingTask, identity_of
    from factory.training.world import World
    from schemas.identity import random_generator
    from schemas.request import SynthesisRequest

    recipe = prepare_recipe(method, real, folder, steps)
    settings = dataclasses.replace(recipe.training, max_steps=steps, sample_every=0, validate_every=0)
    task = TrainingTask(
        recipe=recipe.name,
        generator=recipe.generator,
        objectives=recipe.objectives,
        settings=settings,
        prompts=recipe.prompts,
        sampling=recipe.sampling,
        real=real,
        real_version=open_table(real).version,
        out=folder / "run",
    )
    task.out.mkdir(parents=True)
    train_generator(task, identity_of(task), World())
    train_rows = decode_rows(real_rows(real, splits=("train",)), 128)
    prompts = recipe.prompts.fit(train_rows)
    backgrounds = None if recipe.backgrounds is None else recipe.backgrounds.fit(train_rows)
    prepared = []
    for number, row in enumerate(asked):
        request = SynthesisRequest(
            request_id=f"{number:032x}",
            plan_id="0" * 32,
            request_index=number,
            label=row.label_name,
            label_index=row.label,
            ordinal=number,
        )
        rng = random_generator(request.request_id, "picture")
        prompt = prompts.draw(request, rng, row.mask).prompt
        background = None if backgrounds is None else backgrounds.draw(request, rng, row.mask).image
        prepared.append(
            PreparedRequest(
                request=request,
                requested_mask=None if recipe.masks is None else row.mask,
                prompt=prompt,
                background=background,
            )
        )
    synthesizer = Synthesizer(
        recipe.generator,
        task.out,
        recipe.sampling,
        recipe.guidances,
        recipe.annotator,
        batch_size=len(prepared),
        feather=0.0 if recipe.backgrounds is None else recipe.backgrounds.feather,
    )
    made = synthesizer.synthesize(prepared)
    empty = np.zeros((128, 128), np.uint8)
    images = [empty if item.image is None else item.image for item in made]
    return images, [empty if item.mask is None else 255 * item.mask for item in made]


def prepare_recipe(method: str, real: str, folder: Path, steps: int) -> Any:
    """The recipe with what it needs made: captions for didgen, a fine-tuned autoencoder for scmg."""
    from factory.recipes import RECIPES
    from jobs import caption, train

    recipe = RECIPES[method]()
    if method.startswith("didgen"):
        captions = str(folder / "captions.lance")
        caption.run(caption.Args(real=real, out=captions, recipe=method))
        return dataclasses.replace(recipe, prompts=dataclasses.replace(recipe.prompts, captions=captions))
    if method.startswith("scmg"):
        train.run(
            train.Args(recipe=method, real=real, out=str(folder / "vae"), part="vae", max_steps=steps // 3)
        )
        generator = dataclasses.replace(recipe.generator, vae=str(folder / "vae"))
        return dataclasses.replace(recipe, generator=generator)
    return recipe


def draw(rows: list[tuple[str, list[np.ndarray]]]) -> Image.Image:
    """One labelled strip per row."""
    count = len(rows[0][1])
    sheet = Image.new("L", (LEFT + count * (CELL + 4), len(rows) * (CELL + 4)), 255)
    pen = ImageDraw.Draw(sheet)
    for y, (name, images) in enumerate(rows):
        pen.text((4, y * (CELL + 4) + CELL // 2 - 6), name, fill=0)
        for x, image in enumerate(images):
            grey = image if image.ndim == 2 else image.mean(axis=-1).round().astype(np.uint8)
            tile = Image.fromarray(grey).resize((CELL, CELL))
            sheet.paste(tile, (LEFT + x * (CELL + 4), y * (CELL + 4)))
    return sheet


if __name__ == "__main__":
    main()
