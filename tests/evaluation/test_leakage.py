from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from planted import pictures, write_real, write_synthetic

from factory.evaluation.data import plan_ids, read_real
from factory.evaluation.leakage import (
    check_disjoint,
    check_parts_disjoint,
    check_real_budget,
    generator_records,
    images_shared_between,
    rows_digest,
)
from factory.predictors.examples import concatenate
from factory.storage import open_table, real_digest


def test_disjoint_rows_pass_and_every_way_to_leak_is_refused() -> None:
    train, test = pictures("train", (6, 6), 0), pictures("test", (6, 6), 1)
    check_disjoint(train, evaluation=test, validation=None)
    with pytest.raises(ValueError, match=r"leak: 1 row\(s\) of evaluation share their id .*test-3"):
        check_disjoint(concatenate(train, test.take([3])), evaluation=test)
    same_patient = replace(test.take([5]), ids=("another view",))
    with pytest.raises(ValueError, match="share their group .*test-5"):
        check_disjoint(concatenate(train, same_patient), evaluation=test)
    copied = replace(test.take([2]), ids=("synthetic",), groups=("synthetic",), is_real=np.array([False]))
    with pytest.raises(ValueError, match="share their pixels .*test-2 = synthetic"):
        check_disjoint(concatenate(train, copied), evaluation=test)
    check_disjoint(train, evaluation=test)


def test_blank_images_are_no_copies() -> None:
    train, test = pictures("train", (2, 2), 0), pictures("test", (2, 2), 1)
    blank = np.zeros_like(train.images)
    check_disjoint(replace(train, images=blank), evaluation=replace(test, images=blank))


def test_a_group_in_two_parts_is_refused() -> None:
    one, two = pictures("a", (2, 2), 0), pictures("b", (2, 2), 1)
    check_parts_disjoint({"train": one, "val": two})
    with pytest.raises(ValueError, match="is in train and in val"):
        check_parts_disjoint({"train": one, "val": concatenate(two, one.take([0]))})


def test_the_generator_must_know_exactly_the_training_rows(tmp_path: Path) -> None:
    real = write_real(tmp_path / "real.lance", {"train": 8, "val": 4}, 0)
    synthetic = write_synthetic(tmp_path / "synthetic.lance", real, 3, 1)
    rows = read_real(real, ("train",), size=24, channels=1)
    assert rows_digest(rows) == real_digest(open_table(real))
    records = generator_records(open_table(synthetic), plan_ids(synthetic))
    check_real_budget(synthetic, records, rows_digest(rows))
    with pytest.raises(ValueError, match="was made from other real rows"):
        check_real_budget(synthetic, records, rows_digest(rows.take(slice(1, None))))
    check_real_budget(synthetic, records, "anything", scenario="release")
    with pytest.raises(ValueError, match="plan unknown has no record"):
        generator_records(open_table(synthetic), ["unknown"])


def test_the_same_frame_in_two_tables_is_found(tmp_path: Path) -> None:
    import json

    from factory.datasets.phantom import PhantomConfig, phantom_sample
    from factory.embedding import ImageEmbedder
    from factory.imaging import encode_png
    from factory.storage import write_table
    from schemas.sample import RealSample, real_schema, table_of

    embedder = ImageEmbedder().load(num_threads=1)
    images = [phantom_sample(PhantomConfig(size=128), 2, index).image for index in range(5)]
    images.append(np.ascontiguousarray(images[1][6:, 8:]))  # the crop of a training image, in the other table

    def write(name: str, numbers: list[int], split: str) -> str:
        vectors = embedder.embed([images[k] for k in numbers])
        rows = [
            RealSample(
                image_id=f"{name}-{k}", dataset=name, source_path=f"{k}.png", group_id=f"{name}-{k}", split=split,
                label=0, label_name="lesion", image=encode_png(images[k]), mask=None, height=images[k].shape[0],
                width=images[k].shape[1], licence="none", allowed_use="tests", embedding=tuple(vector.tolist()),
            )
            for k, vector in zip(numbers, vectors)
        ]  # fmt: skip
        schema = real_schema(embedder.spec.dim)
        metadata = {"class_names": json.dumps(["lesion"]), "embedder": embedder.spec.to_json()}
        return write_table(str(tmp_path / name), table_of(rows, schema), schema, metadata=metadata).uri

    one, two = write("one", [0, 1, 2], "train"), write("two", [3, 4, 5], "val")
    shared = images_shared_between(one, ("train",), two, ("val",))
    assert [(pair.image_id, pair.other_id) for pair in shared] == [("one-1", "two-5")]
