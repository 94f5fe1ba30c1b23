"""Recipes on the command line: by name or `module:function`, single fields overridden with types and errors.

`--recipe tiny --sampling.num-inference-steps 30` changes one field; `masks:real-masks --masks.shift 0.1`
chooses another component of the same kind and sets its fields. The order does not matter.
"""

import dataclasses
import difflib
import importlib
import importlib.machinery
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, get_args, get_type_hints

from factory.recipes import RECIPES, Recipe

Args = TypeVar("Args")
_FIELDS = tuple(field.name for field in dataclasses.fields(Recipe))


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
    module = _module_below(Path.cwd().resolve(), module_name, name)
    function = getattr(module, function_name, None)
    if function is None:
        raise ValueError(f"--recipe {name!r}: {module_name} has no function {function_name!r}")
    recipe = function()
    if not isinstance(recipe, Recipe):
        raise ValueError(f"--recipe {name!r} returned a {type(recipe).__name__}, not a Recipe")
    return recipe


def _module_below(root: Path, module_name: str, recipe: str) -> ModuleType:
    """The module of that dotted name below `root`; no code outside `root` runs in looking for it."""
    path = [str(root)]
    for part in module_name.split("."):
        spec = importlib.machinery.PathFinder.find_spec(part, path) if part.isidentifier() else None
        places = [*(spec.submodule_search_locations or ()), *filter(None, [spec.origin])] if spec else []
        if spec is None or not places:
            raise ValueError(
                f"--recipe {recipe!r}: no module {module_name!r} below the working directory {root}"
            )
        if not all(Path(place).resolve().is_relative_to(root) for place in places):
            raise ValueError(f"--recipe {recipe!r}: {places[0]} lies outside the working directory {root}")
        path = list(spec.submodule_search_locations or ())
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"--recipe {recipe!r}: {error}") from error
    source = Path(module.__file__ or "").resolve()
    if not source.is_relative_to(root):
        raise ValueError(
            f"--recipe {recipe!r}: Python already has a module {module_name!r}, {source}; name yours otherwise"
        )
    return module


def parse_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe with single fields overridden, as typed on a command line.

    Raises:
        ValueError: unknown recipe, or components that cannot work together.
        SystemExit: an unknown field or a value of the wrong type (the message suggests the nearest field).
    """
    recipe = get_recipe(name)
    if not overrides:
        recipe.check()
        return _with_absolute_paths(recipe)
    import tyro

    chosen, options = recipe, []
    for item in overrides:
        if not item.startswith("-") and item.split(":")[0].split(".")[0] in _FIELDS and ":" in item:
            chosen = choose(chosen, item)
        else:
            options.append(item)
    changed = tyro.cli(
        Recipe,
        default=chosen,
        args=options,
        config=(tyro.conf.AvoidSubcommands,),
        prog=f"--recipe {name}",
        console_outputs=True,
    )
    changed = dataclasses.replace(changed, name=recipe.name, paper=recipe.paper)
    changed.check()
    return _with_absolute_paths(changed)


_PATHS = ("base", "vae", "checkpoint", "captions", "table", "weights")
"""Fields of components that may name a local file or folder."""


def _with_absolute_paths(value: Any) -> Any:
    """A component whose local paths hold in any working directory: Ray's workers have others."""
    if isinstance(value, tuple):
        return tuple(_with_absolute_paths(item) for item in value)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    changes = {}
    for field in dataclasses.fields(value):
        present = getattr(value, field.name)
        if field.name in _PATHS and isinstance(present, str):
            path = Path(present).expanduser()
            if present not in ("", "tiny") and path.exists():
                changes[field.name] = str(path.resolve())
        elif (inner := _with_absolute_paths(present)) is not present and inner != present:
            changes[field.name] = inner
    return dataclasses.replace(value, **changes) if changes else value


def choose(recipe: Recipe, choice: str) -> Recipe:
    """The recipe with another component in a field: `masks:real-masks`, `guidances.0:masked-blend`, `annotator:none`.

    The component comes with its own defaults, unless the recipe's is of that kind already. In a tuple the number
    after the last appends.

    Raises:
        ValueError: no such field or component; the ones there are, the nearest first.
    """
    path, _, wanted = choice.partition(":")
    return _replaced(recipe, Recipe, path.split("."), wanted, choice)


def _replaced(owner: Any, kind: Any, path: Sequence[str], wanted: str, choice: str) -> Any:
    """`owner` with what `path` leads to replaced by the member of its type that is called `wanted`."""
    if not path:
        return _member(owner, kind, wanted, choice)
    head, rest = path[0], path[1:]
    if isinstance(owner, tuple):
        element = get_args(kind)[0]
        if not head.isdigit() or int(head) > len(owner):
            raise ValueError(f"{choice!r}: want a number of 0 … {len(owner)} in the place of {head!r}")
        items = list(owner) if int(head) < len(owner) else [*owner, None]
        items[int(head)] = _replaced(items[int(head)], element, rest, wanted, choice)
        return tuple(items)
    hints = get_type_hints(type(owner)) if dataclasses.is_dataclass(owner) else {}
    if head not in hints:
        raise ValueError(f"{choice!r}: no field {head!r}; there are {', '.join(hints)}")
    return dataclasses.replace(
        owner, **{head: _replaced(getattr(owner, head), hints[head], rest, wanted, choice)}
    )


def _member(present: Any, kind: Any, wanted: str, choice: str) -> Any:
    members = {_kebab(member): member for member in get_args(kind) or (kind,)}
    if wanted.lower() not in members:
        near = difflib.get_close_matches(wanted, members, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{choice!r}: {wanted!r} is none of {', '.join(members)}{hint}")
    member = members[wanted.lower()]
    if member is type(None):
        return None
    return present if type(present) is member else member()


def _kebab(member: Any) -> str:
    """DeformedEllipse → deformed-ellipse, CurvatureGAN → curvature-gan, None → none."""
    if member is type(None):
        return "none"
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", member.__name__).lower()


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
