"""Prompts: the paper's eight strings, and descriptors drawn together with label and shape."""

import dataclasses
import itertools
import pickle
from collections import Counter

import numpy as np
import pytest

from factory import geometry
from factory.imaging import TrainingRow
from factory.sources.masks import DeformedEllipse
from factory.sources.prompts import BiradsTemplate, LabelPrompt
from schemas.identity import random_generator
from schemas.request import SynthesisPlan

EIGHT = {
    f"breast ultrasound image of {label} tumor with {echogenicity} echogenicity and {boundary} boundary."
    for label, echogenicity, boundary in itertools.product(
        ("benign", "malignant"), ("homogeneous", "heterogeneous"), ("clear", "unclear")
    )
}


def test_prompts_are_the_papers_eight_strings(phantom_rows: list[TrainingRow], plan: SynthesisPlan) -> None:
    fitted = BiradsTemplate().fit(phantom_rows)
    lesions = [row for row in phantom_rows if row.label_name != "normal"]
    assert {fitted.describe(row) for row in lesions} == EIGHT
    mask = geometry.ellipse((64, 64), x=32, y=32, a=9, b=7)
    drawn = {
        fitted.draw(plan.request(label, k), np.random.default_rng(k), mask).prompt
        for label in ("benign", "malignant")
        for k in range(60)
    }
    assert drawn <= EIGHT


def test_description_of_a_training_row_uses_its_own_descriptors(phantom_rows: list[TrainingRow]) -> None:
    fitted = BiradsTemplate().fit(phantom_rows)
    for row in phantom_rows[:40]:
        prompt = fitted.describe(row)
        if row.label_name == "normal":
            assert prompt == "breast ultrasound image of normal tissue."
        else:
            a = row.attributes
            assert f"with {a['echogenicity']} echogenicity and {a['boundary']} boundary." in prompt
    bare = dataclasses.replace(phantom_rows[0], mask=None, label_name="benign")
    assert fitted.describe(bare) == "breast ultrasound image of benign tissue."


def test_no_lesion_no_descriptors(phantom_rows: list[TrainingRow], plan: SynthesisPlan) -> None:
    fitted = BiradsTemplate().fit(phantom_rows)
    for mask in (None, np.zeros((32, 32), np.uint8)):
        draw = fitted.draw(plan.request("normal", 0), np.random.default_rng(0), mask)
        assert draw.prompt == "breast ultrasound image of normal tissue."
        assert "echogenicity" not in draw.parameters
    with pytest.raises(ValueError, match="'normal': the mask has a lesion, but no training row"):
        fitted.draw(plan.request("normal", 0), np.random.default_rng(0), np.ones((32, 32), np.uint8))


@pytest.mark.parametrize("label", ["benign", "malignant"])
def test_pairs_keep_the_joint_frequencies_of_the_label(
    phantom_rows: list[TrainingRow], plan: SynthesisPlan, label: str
) -> None:
    """Independent draws of the two descriptors would miss pairs by their correlation."""
    prompts, masks = BiradsTemplate().fit(phantom_rows), DeformedEllipse().fit(phantom_rows)
    rows = [row for row in phantom_rows if row.label_name == label]
    real = Counter((row.attributes["echogenicity"], row.attributes["boundary"]) for row in rows)
    drawn: Counter[tuple] = Counter()
    for ordinal in range(600):
        request = plan.request(label, ordinal)
        mask = masks.draw(request, random_generator(request.request_id, "mask")).mask
        p = prompts.draw(request, random_generator(request.request_id, "prompt"), mask).parameters
        drawn[p["echogenicity"], p["boundary"]] += 1
    total = sum(abs(real[pair] / len(rows) - drawn[pair] / 600) for pair in real | drawn) / 2
    print(label, f"total variation {total:.3f}")
    assert total < 0.1


def test_descriptors_follow_the_shape(phantom_rows: list[TrainingRow], plan: SynthesisPlan) -> None:
    """Small lesions homogeneous and clear, large ones heterogeneous and unclear: the draw keeps it so."""
    rows = []
    for k in range(60):
        radius = 6 + k % 3 if k % 2 else 24 + k % 3
        words = ("homogeneous", "clear") if k % 2 else ("heterogeneous", "unclear")
        rows.append(
            dataclasses.replace(
                phantom_rows[0],
                image_id=str(k),
                label_name="benign",
                mask=geometry.ellipse((128, 128), x=64, y=64, a=radius, b=radius),
                attributes=dict(zip(("echogenicity", "boundary"), words)),
            )
        )
    fitted = BiradsTemplate().fit(rows)
    for radius, words in ((7, ("homogeneous", "clear")), (25, ("heterogeneous", "unclear"))):
        mask = geometry.ellipse((128, 128), x=40, y=70, a=radius, b=radius)
        for k in range(20):
            p = fitted.draw(plan.request("benign", k), np.random.default_rng(k), mask).parameters
            assert (p["echogenicity"], p["boundary"]) == words


def test_draw_is_the_same_at_another_resolution_and_after_pickling(
    phantom_rows: list[TrainingRow], plan: SynthesisPlan
) -> None:
    fitted = BiradsTemplate(resemblance=("area", "aspect", "solidity")).fit(phantom_rows)
    refitted = BiradsTemplate(resemblance=("area", "aspect", "solidity")).fit(phantom_rows[::-1])
    again = pickle.loads(pickle.dumps(refitted))  # noqa: S301
    assert fitted.fitted_on == again.fitted_on
    for k in range(20):
        mask = geometry.ellipse((128, 128), x=60, y=70, a=12 + k, b=10 + k / 2)
        one = fitted.draw(plan.request("benign", k), np.random.default_rng(k), mask)
        two = again.draw(plan.request("benign", k), np.random.default_rng(k), mask)
        assert one == two


def test_templates_are_checked() -> None:
    with pytest.raises(ValueError, match=r"template: unknown field\(s\) \{shape\}"):
        BiradsTemplate(template="a {shape} {label}")
    with pytest.raises(ValueError, match="template_without_lesion"):
        BiradsTemplate(template_without_lesion="{boundary}")
    with pytest.raises(ValueError, match="no format string"):
        LabelPrompt(template="{label")
    with pytest.raises(ValueError, match="neighbours"):
        BiradsTemplate(neighbours=0)
    with pytest.raises(ValueError, match="resemblance"):
        BiradsTemplate(resemblance=())


def test_unknown_label_is_named(phantom_rows: list[TrainingRow], plan: SynthesisPlan) -> None:
    rows = [row for row in phantom_rows if row.label_name == "benign"]
    with pytest.raises(ValueError, match="'malignant': no training row"):
        BiradsTemplate().fit(rows).draw(plan.request("malignant", 0), np.random.default_rng(0), rows[0].mask)


def test_label_prompt_names_the_label_and_draws_nothing(
    phantom_rows: list[TrainingRow], plan: SynthesisPlan
) -> None:
    fitted = LabelPrompt(template="a scan of {label}").fit(phantom_rows)
    rng = np.random.default_rng(0)
    state = rng.bit_generator.state
    assert fitted.draw(plan.request("benign", 0), rng, None).prompt == "a scan of benign"
    assert rng.bit_generator.state == state
    assert fitted.describe(phantom_rows[0]) == f"a scan of {phantom_rows[0].label_name}"
    assert fitted.fitted_on == BiradsTemplate().fit(phantom_rows).fitted_on
