"""What recipes there are, and everything one of them says.

factory recipes
factory recipes show tiny
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from factory.recipes import RECIPES, Recipe
from factory.sources.backgrounds import RealNormals
from jobs.recipe_args import parse_recipe


def _lines(value: Any, indent: int = 0) -> Iterator[str]:
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        pad = "  " * indent
        if dataclasses.is_dataclass(item):
            yield f"{pad}{field.name}: {type(item).__name__}"
            yield from _lines(item, indent + 1)
        elif isinstance(item, tuple) and item and dataclasses.is_dataclass(item[0]):
            for position, member in enumerate(item):
                yield f"{pad}{field.name}.{position}: {type(member).__name__}"
                yield from _lines(member, indent + 1)
        else:
            yield f"{pad}{field.name} = {item!r}"


def _availability(base: str) -> str:
    """Whether the base checkpoint is on this machine, without asking the network."""
    from pathlib import Path

    if base == "tiny":
        return "shipped"
    if Path(base).is_dir():
        return "local folder"
    from huggingface_hub import try_to_load_from_cache

    cached = isinstance(try_to_load_from_cache(base, "model_index.json"), str)
    return "in the hub cache" if cached else "not on this machine (downloaded from the hub on first use)"


MADE_BY = {
    "CurvatureGAN": "factory train --part mask_gan",
    "MaskDiffusion": "factory train --part mask_diffusion",
    "CaptionTable": "factory caption",
    "HealedLesions": "factory heal",
}
"""Which command makes what a source reads."""


def needs_of(recipe: Recipe) -> Iterator[str]:
    """What a recipe must be given before it can synthesize, and whether that is there."""
    generator = recipe.generator
    yield f"base {generator.base}: {_availability(generator.base)}"
    needs = {need for item in recipe.objectives for need in item.needs}
    if "masks" in needs or generator.conditioning.uses_mask or generator.conditioning.uses_inpaint:
        yield "real table with masks"
    if isinstance(recipe.backgrounds, RealNormals):
        yield "images without a lesion, or backgrounds:healed-lesions (factory heal)"
    for name in ("masks", "prompts", "backgrounds"):
        source = getattr(recipe, name)
        kind = type(source).__name__
        if kind not in MADE_BY:
            continue
        try:
            source.weights()
        except FileNotFoundError:
            yield f"{name} {kind}: absent, made by `{MADE_BY[kind]}`"
        else:
            yield f"{name} {kind}: present"
    if "sketches" in needs:
        yield "sketches: drawn on first use, kept beside the real table"


def trains(recipe: Recipe) -> str:
    """Which weights `factory train` changes."""
    generator = recipe.generator
    unet = {"full": "UNet", "lora": f"UNet LoRA rank {generator.trainable.lora_rank}", "frozen": ""}
    parts = [unet[generator.trainable.unet], "ControlNet" if generator.trains_controlnet else ""]
    losses = " + ".join(type(item).__name__ for item in recipe.objectives)
    return f"{' + '.join(part for part in parts if part)} by {losses}"


def command(argv: Sequence[str]) -> int:
    """`factory recipes` and `factory recipes show NAME [overrides]`."""
    from rich.console import Console
    from rich.table import Table

    if argv and argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if argv:
        if argv[0] != "show" or len(argv) < 2:
            raise ValueError(f"factory recipes {' '.join(argv)}: want nothing or `show NAME`")
        recipe = parse_recipe(argv[1], argv[2:])
        print("\n".join(_lines(recipe)))
        for need in needs_of(recipe):
            print(f"needs: {need}")
        print(f"fingerprint = {recipe.fingerprint}")
        return 0
    table = Table(show_lines=True)
    for heading in ("recipe", "what", "paper", "conditioning", "trains", "needs"):
        table.add_column(heading, no_wrap=heading == "recipe")
    for name, make in RECIPES.items():
        if name.endswith("_tiny"):
            continue
        recipe = make()
        conditioning = type(recipe.generator.conditioning).__name__
        paper = recipe.paper.partition(",")[0]
        table.add_row(name, recipe.summary, paper, conditioning, trains(recipe), "\n".join(needs_of(recipe)))
    console = Console()
    console.print(table)
    small = ", ".join(name for name in RECIPES if name.endswith("_tiny"))
    console.print(f"To try a method on a CPU, on the shipped base at 128 px: {small}")
    console.print("All fields of one: factory recipes show NAME. What each is for: docs/methods.md")
    return 0
