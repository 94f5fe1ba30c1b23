"""Recipes on the command line: by name or `module:function`, single fields overridden with types and errors.

`--recipe tiny --sampling.num-inference-steps 30` changes one field; `masks:real-masks --masks.max-shift 0.1`
chooses another component of the same kind and sets its fields.
"""

import dataclasses
import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from factory.recipes import RECIPES, Recipe

Args = TypeVar("Args")


def get_recipe(name: str) -> Recipe:
    """The recipe of that name, or what `module:function` below the working directory returns.

    Raises:
        ValueError: no such recipe (the nearest name is suggested), or the function returns something else.
    """
    if name in RECIPES:
        return RECIPES[name]()
    if ":" not in name:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"--recipe {name!r} is none of {', '.join(RECIPES)} (or module:function){hint}")
    module_name, _, function_name = name.partition(":")
    root = Path.cwd().resolve()
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"--recipe {name!r}: {error}; it is looked up from {root}") from error
    source = Path(module.__file__ or "").resolve()
    if not source.is_relative_to(root):
        raise ValueError(f"--recipe {name!r}: {source} lies outside the working directory {root}")
    function = getattr(module, function_name, None)
    if function is None:
        raise ValueError(f"--recipe {name!r}: {module_name} has no function {function_name!r}")
    recipe = function()
    if not isinstance(recipe, Recipe):
        raise ValueError(f"--recipe {name!r} returned a {type(recipe).__name__}, not a Recipe")
    return recipe


def parse_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe with single fields overridden, as typed on a command line.

    Raises:
        ValueError: unknown recipe, or components that cannot work together.
        SystemExit: an unknown field or a value of the wrong type (the message suggests the nearest field).
    """
    recipe = get_recipe(name)
    if not overrides:
        recipe.check()
        return recipe
    import tyro

    fields = [f.name for f in dataclasses.fields(Recipe)]
    chooses = any(":" in item and item.split(":")[0].split(".")[0] in fields for item in overrides)
    config = () if chooses else (tyro.conf.AvoidSubcommands,)
    changed = tyro.cli(
        Recipe,
        default=recipe,
        args=list(overrides),
        config=config,
        prog=f"--recipe {name}",
        console_outputs=True,
    )
    changed = dataclasses.replace(changed, name=recipe.name, paper=recipe.paper)
    changed.check()
    return changed


def parse_args(kind: type[Args], argv: Sequence[str], prog: str, description: str = "") -> Args:
    """Job arguments by tyro; what it does not know goes to the field `overrides`, for `parse_recipe`."""
    import tyro

    args, unknown = tyro.cli(
        kind, args=list(argv), prog=prog, description=description, return_unknown_args=True
    )
    changes: dict[str, Any] = {"overrides": tuple(unknown)}
    own = [f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for item in unknown:
        near = difflib.get_close_matches(item, own, n=1, cutoff=0.8)
        if near and "." not in item:
            raise ValueError(f"unknown option {item}; did you mean {near[0]}?")
    return dataclasses.replace(args, **changes)  # type: ignore[type-var]
