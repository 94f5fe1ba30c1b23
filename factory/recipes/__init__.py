"""The built-in recipes, by name."""

from collections.abc import Callable

from factory.recipes.clinical_prior import clinical_prior
from factory.recipes.recipe import Recipe
from factory.recipes.tiny import tiny

RECIPES: dict[str, Callable[[], Recipe]] = {
    "tiny": tiny,
    "clinical_prior": clinical_prior,
}

__all__ = ["RECIPES", "Recipe"]
