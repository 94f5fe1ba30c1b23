"""Backgrounds: real images without a lesion, or healed ones, that show tissue where the lesion goes."""

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from factory.imaging import TrainingRow, encode_png
from factory.sources.backgrounds import HealedLesions, RealNormals, tissue_of
from schemas.identity import canonical, fingerprint, random_generator
from schemas.request import SynthesisPlan

SIDE = 128


def mask(top: int = 50, left: int = 40) -> np.ndarray:
    out = np.zeros((SIDE, SIDE), np.uint8)
    out[top : top + 20, left : left + 30] = 1
    return out


def test_normals_are_drawn_with_their_provenance(
    phantom_rows: list[TrainingRow], plan: SynthesisPlan
) -> None:
    fitted = RealNormals().fit(phantom_rows)
    by_id = {row.image_id: row for row in phantom_rows}
    drawn = set()
    for ordinal in range(40):
        request = plan.request("benign", ordinal)
        found = fitted.draw(request, random_generator(request.request_id, "background"), mask())
        row = by_id[found.background_id]
        assert row.label_name == "normal" and found.group_id == row.group_id and found.licence is None
        assert np.array_equal(found.image, row.image)
        assert found.parameters["background_source"] == "real_normals"
        drawn.add(found.background_id)
    assert len(drawn) > 10


def test_a_draw_depends_on_its_request_and_not_on_the_order_of_rows(
    phantom_rows: list[TrainingRow], plan: SynthesisPlan
) -> None:
    request = plan.request("malignant", 3)
    fits = [RealNormals().fit(rows) for rows in (phantom_rows, phantom_rows[::-1])]
    fits.append(pickle.loads(pickle.dumps(fits[0])))  # noqa: S301
    found = {f.draw(request, random_generator(request.request_id, "b"), mask()).background_id for f in fits}
    assert len(found) == 1 and len({f.fitted_on for f in fits}) == 1


def test_the_black_margin_takes_no_lesion(phantom_rows: list[TrainingRow], plan: SynthesisPlan) -> None:
    """Half of the backgrounds are letterboxed: rows 0-31 are padding."""
    normals = [row for row in phantom_rows if row.label_name == "normal"]
    padded = [
        dataclasses.replace(row, image=np.where(np.arange(SIDE)[:, None] < 32, 0, row.image).astype(np.uint8))
        for row in normals[::2]
    ]
    fitted = RealNormals().fit([*padded, *normals[1::2]])
    ids = {row.image_id for row in padded}
    for ordinal in range(20):
        request = plan.request("benign", ordinal)
        rng = random_generator(request.request_id, "background")
        assert fitted.draw(request, rng, mask(top=4)).background_id not in ids
    only = RealNormals().fit(padded)
    with pytest.raises(ValueError, match="none of .* has tissue"):
        only.draw(plan.request("benign", 0), np.random.default_rng(0), mask(top=4))
    free = RealNormals(min_tissue=0.0).fit(padded)
    assert (
        free.draw(plan.request("benign", 0), np.random.default_rng(0), mask(top=4)).parameters["tissue"] < 0.3
    )
    empty = only.draw(plan.request("normal", 0), np.random.default_rng(0), mask() * 0)
    assert empty.parameters["tissue"] == 1.0


def test_dark_tissue_is_tissue_and_padding_is_not() -> None:
    image = np.zeros((SIDE, SIDE), np.uint8)
    image[32:] = np.random.default_rng(0).integers(0, 40, (SIDE - 32, SIDE))
    tissue = tissue_of(image)
    assert not tissue[:26].any() and tissue[36:].all()
    assert np.array_equal(tissue_of(np.stack([image] * 3, axis=2)), tissue)


def test_without_normals_the_way_out_is_named(phantom_rows: list[TrainingRow]) -> None:
    lesions = [row for row in phantom_rows if row.label_name != "normal"]
    with pytest.raises(ValueError, match=r"RealNormals: none of .*factory heal"):
        RealNormals().fit(lesions)
    with pytest.raises(ValueError, match="feather"):
        RealNormals(feather=0.5)
    with pytest.raises(ValueError, match="min_tissue"):
        HealedLesions(min_tissue=2)


def write_healed(path: Path, rows: list[TrainingRow], level: int = 90) -> str:
    from factory.storage import write_table
    from jobs.heal import HEALED_SCHEMA

    values = [
        {
            "image_id": row.image_id,
            "group_id": row.group_id,
            "licence": "CC BY 4.0",
            "label_name": row.label_name,
            "image": encode_png(np.full_like(row.image, level)),
            "healed_mask": encode_png(np.ones((SIDE, SIDE), np.uint8)),
        }
        for row in rows
    ]
    table = pa.Table.from_pylist(values, schema=HEALED_SCHEMA)
    write_table(str(path), table, HEALED_SCHEMA, overwrite=True)
    return str(path)


def test_healed_images_are_drawn_and_their_content_is_their_identity(
    tmp_path: Path, phantom_rows: list[TrainingRow], plan: SynthesisPlan
) -> None:
    lesions = [row for row in phantom_rows if row.label_name != "normal"][:6]
    source = HealedLesions(table=write_healed(tmp_path / "a.lance", lesions))
    fitted = source.fit(phantom_rows)
    found = fitted.draw(plan.request("benign", 1), np.random.default_rng(1), mask())
    assert (found.image == 90).all() and found.licence == "CC BY 4.0"
    assert found.background_id in {row.image_id for row in lesions}
    assert found.parameters["background_source"] == "healed_lesions"
    same = HealedLesions(table=write_healed(tmp_path / "b.lance", lesions[::-1]))
    other = HealedLesions(table=write_healed(tmp_path / "c.lance", lesions, level=91))
    assert source.weights() == same.weights() != other.weights()
    assert fingerprint(source) == fingerprint(other) and "table" not in canonical(source)


def test_a_healed_table_of_other_images_is_refused(tmp_path: Path, phantom_rows: list[TrainingRow]) -> None:
    for table in ("", str(tmp_path / "none.lance")):
        with pytest.raises(FileNotFoundError, match="factory heal"):
            HealedLesions(table=table).weights()
    source = HealedLesions(table=write_healed(tmp_path / "a.lance", phantom_rows[:3]))
    with pytest.raises(ValueError, match="no training row"):
        source.fit(phantom_rows[1:])
    small = [dataclasses.replace(row, image=row.image[:64, :64]) for row in phantom_rows]
    with pytest.raises(ValueError, match="healed at 128 px"):
        source.fit(small)
    with pytest.raises(ValueError, match="no rows"):
        HealedLesions(table=write_healed(tmp_path / "empty.lance", [])).fit(phantom_rows)
