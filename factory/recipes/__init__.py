"""The built-in recipes, by name."""

from collections.abc import Callable
from functools import partial

from factory.recipes.clinical_prior import clinical_prior
from factory.recipes.didgen import didgen
from factory.recipes.meddiff_ft import meddiff_ft, meddiff_inpaint
from factory.recipes.recipe import Recipe
from factory.recipes.scmg import scmg
from factory.recipes.sketch_ldm import sketch_ldm
from factory.recipes.tiny import at_tiny_width, tiny

_PAPERS = (sketch_ldm, clinical_prior, didgen, scmg, meddiff_ft, meddiff_inpaint)


def _tiny(make: Callable[[], Recipe]) -> Recipe:
    return at_tiny_width(make())


RECIPES: dict[str, Callable[[], Recipe]] = {
    "tiny": tiny,
    **{make.__name__: make for make in _PAPERS},
    **{f"{make.__name__}_tiny": partial(_tiny, make) for make in _PAPERS if make is not clinical_prior},
}

__all__ = ["RECIPES", "Recipe"]
