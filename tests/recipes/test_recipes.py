"""What recipes say of themselves, and which components refuse each other before any work."""

import dataclasses
from collections.abc import Callable

import pytest

from factory.recipes import RECIPES, Recipe
from factory.sources.masks import DeformedEllipse
from jobs.recipe_args import parse_recipe
from jobs.recipes import needs_of, trains

Change = Callable[[Recipe], Recipe]


@pytest.mark.parametrize("name", RECIPES)
def test_every_built_in_recipe_fits_together_and_says_what_it_needs(name: str) -> None:
    recipe = RECIPES[name]()
    recipe.check()
    assert recipe == RECIPES[name]() and hash(recipe) == hash(RECIPES[name]())
    needs = list(needs_of(recipe))
    assert needs[0].startswith("base ") and ("shipped" in needs[0]) == (recipe.generator.base == "tiny")
    assert "UNet" in trains(recipe)


def test_the_fingerprints_of_different_methods_differ() -> None:
    prints = {name: make().fingerprint for name, make in RECIPES.items()}
    assert len(set(prints.values())) == len(prints)


def test_what_a_recipe_still_lacks_is_listed_with_the_command_that_makes_it() -> None:
    assert any("factory train --part mask_gan" in need for need in needs_of(RECIPES["scmg"]()))
    assert any("factory train --part mask_diffusion" in need for need in needs_of(RECIPES["meddiff_ft"]()))
    assert any("factory caption" in need for need in needs_of(RECIPES["didgen"]()))
    assert any("sketches" in need for need in needs_of(RECIPES["sketch_ldm"]()))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("meddiff_ft", ["masks:deformed-ellipse"]),
        ("meddiff_ft", ["masks:real-masks", "annotator:requested-mask"]),
        ("meddiff_ft", ["backgrounds:healed-lesions"]),
        ("scmg", ["masks:deformed-ellipse"]),
        ("clinical_prior", ["masks:curvature-gan"]),
        ("clinical_prior", ["prompts:label-prompt"]),
        ("didgen", ["masks:mask-diffusion"]),
        ("didgen", ["annotator:requested-mask"]),
        ("sketch_ldm", ["--prompts.template", "ultrasound, {label}"]),
    ],
)
def test_components_combine_across_recipes(name: str, overrides: list[str]) -> None:
    changed = parse_recipe(name, overrides)
    assert changed.fingerprint != RECIPES[name]().fingerprint


def test_a_chosen_component_is_the_one_named() -> None:
    assert parse_recipe("meddiff_ft", ["masks:deformed-ellipse"]).masks == DeformedEllipse()


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("clinical_prior", ["masks:None"], "TextAndMask needs requested masks, and masks is None"),
        (
            "meddiff_ft",
            ["backgrounds:None"],
            "MaskedBlend puts lesions into backgrounds, and backgrounds is None",
        ),
        ("clinical_prior", ["backgrounds:real-normals"], "RealNormals would not be used; add MaskedBlend"),
        ("didgen", ["prompts:label-prompt"], "reads the attention of '<lesion>'"),
        ("didgen", ["prompts:caption-table", "--prompts.prefix", "A photo."], "'<skin>'"),
        ("clinical_prior", ["annotator:attention-otsu"], "AttentionOtsu reads the attention of '<lesion>'"),
        ("sketch_ldm", ["annotator:requested-mask"], "annotator RequestedMask needs requested masks"),
        ("didgen", ["--training.horizontal-flip"], "captions say where the lesion lies"),
    ],
)
def test_impossible_combinations_are_refused_with_the_reason(
    name: str, overrides: list[str], words: str
) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        parse_recipe(name, overrides)
    assert f"recipe {name}" in str(caught.value)


def test_objectives_of_one_kind_are_refused() -> None:
    recipe = RECIPES["tiny"]()
    doubled = dataclasses.replace(recipe, objectives=recipe.objectives * 2)
    with pytest.raises(ValueError, match="no two of a kind"):
        doubled.check()
