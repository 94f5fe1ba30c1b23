import numpy as np
import pyarrow as pa
import pytest

from factory.datasets.layout import Item, Pixels
from factory.datasets.layouts import LAYOUTS
from factory.datasets.layouts.phantom import phantom_listing
from factory.datasets.near_duplicates import NearDuplicates
from factory.datasets.preparation import PreparedDataset, image_ids, prepare_dataset
from factory.datasets.verification import VerifiedImage, verify_items
from factory.imaging import decode_png, decode_rows
from schemas.sample import SPLITS, RealSample

FRACTIONS = (0.7, 0.1, 0.2)


def _embeddings(count: int) -> np.ndarray:
    vectors = np.random.default_rng(0).standard_normal((count, 8)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def phantoms() -> list[VerifiedImage]:
    return verify_items(phantom_listing(num_images=40).items)[0]


def _prepared(images: list[VerifiedImage], search: NearDuplicates | None = None) -> PreparedDataset:
    return prepare_dataset(
        images, _embeddings(len(images)), LAYOUTS["phantom"], ("benign", "malignant"),
        search=search, fractions=FRACTIONS, seed=0, num_quarantined=1,
    )  # fmt: skip


def _copy(
    verified: VerifiedImage, label_name: str, image: np.ndarray, patient: str | None = None
) -> VerifiedImage:
    item = Item(source_path=f"copy/{label_name}", label_name=label_name, patient_id=patient,
                make=lambda: Pixels(image, verified.mask))  # fmt: skip
    return VerifiedImage(item=item, image=image, mask=verified.mask, has_marks=False, attributes={})


def test_rows_hold_the_pixels_and_everything_known(phantoms: list[VerifiedImage]) -> None:
    prepared = _prepared(phantoms)
    table = pa.Table.from_batches(list(prepared.batches()))
    assert table.schema.equals(prepared.schema) and table.num_rows == 40
    for row, verified in zip(table.to_pylist(), phantoms):
        sample = RealSample.from_row(row)
        assert np.array_equal(decode_png(sample.image), verified.image)
        assert np.array_equal(decode_png(sample.mask or b""), verified.mask)
        assert sample.label == ("benign", "malignant").index(sample.label_name)
        assert sample.attributes == verified.attributes and sample.patient_id == verified.item.patient_id
        assert (sample.height, sample.width, sample.photometric) == (128, 128, "grey")
        assert sample.licence and sample.allowed_use and sample.device == "phantom-a"
    assert len(decode_rows(table, 64)) == 40
    assert len(set(table["image_id"].to_pylist())) == 40


def test_a_copy_under_another_label_is_a_conflict_and_stays_in_its_split(
    phantoms: list[VerifiedImage],
) -> None:
    first = next(v for v in phantoms if v.item.label_name == "benign")
    copies = [_copy(first, "malignant", np.ascontiguousarray(first.image[6:, 5:])) for _ in range(2)]
    prepared = _prepared([*phantoms, *copies], NearDuplicates())
    position = phantoms.index(first)
    assert len({prepared.splits[position], prepared.splits[40], prepared.splits[41]}) == 1
    assert prepared.group_ids[position] == prepared.group_ids[40] == prepared.group_ids[41]
    conflicts = prepared.summary.conflicts
    assert [(c.first_label, c.second_label, c.kind) for c in conflicts] == [
        ("benign", "malignant", "frame")
    ] * 2
    assert prepared.summary.duplicates.num_pairs["frame"] == 3
    assert prepared.summary.duplicates.largest_group == 3


def test_patients_stay_together(phantoms: list[VerifiedImage]) -> None:
    shared = [_copy(v, v.item.label_name, v.image, patient=f"p{k % 10}") for k, v in enumerate(phantoms)]
    prepared = _prepared(shared)
    for patient in range(10):
        assert len({prepared.splits[k] for k in range(40) if k % 10 == patient}) == 1
    assert prepared.summary.duplicates.num_groups == 10 and not prepared.summary.duplicates.searched


def test_exact_repetitions_get_ids_of_their_own(phantoms: list[VerifiedImage]) -> None:
    ids = image_ids([phantoms[0], phantoms[1], phantoms[0]])
    assert len(set(ids)) == 3
    assert ids[:2] == image_ids(phantoms[:2])


def test_group_ids_do_not_depend_on_the_order_of_rows(phantoms: list[VerifiedImage]) -> None:
    shared = [_copy(v, v.item.label_name, v.image, patient=f"p{k % 10}") for k, v in enumerate(phantoms)]
    forward, backward = _prepared(shared), _prepared(shared[::-1])
    assert list(forward.group_ids) == list(backward.group_ids)[::-1]


def test_the_summary_counts_what_is_there(phantoms: list[VerifiedImage]) -> None:
    summary = _prepared(phantoms).summary
    assert sum(sum(splits.values()) for splits in summary.counts.values()) == summary.num_images == 40
    assert set(summary.counts) == {"benign", "malignant"} and set(summary.counts["benign"]) == set(SPLITS)
    areas = [float(v.mask.mean()) for v in phantoms if v.mask is not None and v.item.label_name == "benign"]
    assert summary.lesion_area["benign"] == pytest.approx(
        np.quantile(areas, [0, 0.25, 0.5, 0.75, 1]), abs=1e-3
    )
    assert summary.height == summary.width == [128.0] * 5
    assert summary.num_empty_masks == {"benign": 0, "malignant": 0} and summary.num_colour == 0
    assert summary.num_quarantined == 1 and summary.unit == "patient level"
    assert summary.as_json()["duplicates"]["searched"] is False
