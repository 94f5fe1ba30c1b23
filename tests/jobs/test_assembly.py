"""What synthesis and reproduction share: colour, and everything that fixes an image."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from factory.imaging import TrainingRow
from factory.recipes import RECIPES
from jobs.assembly import all_weights, in_colour


def rows(grey: int, colour: int) -> list[TrainingRow]:
    row = TrainingRow(
        image_id="i",
        label=0,
        label_name="a",
        group_id="g",
        image=np.zeros((8, 8), np.uint8),
        mask=None,
        attributes={},
    )
    return [row] * grey + [replace(row, image=np.zeros((8, 8, 3), np.uint8))] * colour


def test_a_few_images_with_coloured_marks_do_not_make_a_dataset_of_colour_images() -> None:
    assert not in_colour(rows(98, 2)) and not in_colour(rows(3, 0))
    assert in_colour(rows(2, 98)) and in_colour(rows(0, 3))


def test_weights_name_every_table_and_model_that_fixes_an_image(generator_folder: Path) -> None:
    recipe = RECIPES["tiny"]()
    assert set(all_weights(recipe, generator_folder, ())) == {"base", "controlnet", "unet_lora"}
    lacking = replace(recipe, masks=RECIPES["scmg_tiny"]().masks)
    with pytest.raises(FileNotFoundError, match="factory train --part mask_gan"):
        all_weights(lacking, generator_folder, ())
