"""`CaptionTable`: which prompt a row and a request get."""

from pathlib import Path

import numpy as np
import pytest

from factory.captions.table import Caption, expanded_caption, write_captions
from factory.imaging import TrainingRow
from factory.sources.captions import CaptionTable
from schemas.identity import random_generator
from schemas.request import SynthesisPlan, SynthesisRequest


def row(number: int, label: str = "naevus") -> TrainingRow:
    return TrainingRow(
        image_id=f"image-{number}", label=0, label_name=label, group_id="g",
        image=np.zeros((32, 32, 3), np.uint8), mask=None, attributes={},
    )  # fmt: skip


def real(number: int, label: str = "naevus", **changes: object) -> Caption:
    values = {"image_id": f"image-{number}", "label_name": label, "caption": f"small lesion {number} on pale skin",
              "captioner": "template"} | changes  # fmt: skip
    return Caption(**values)  # type: ignore[arg-type]


def request(label: str = "naevus", ordinal: int = 0) -> SynthesisRequest:
    plan = SynthesisPlan(
        recipe="r", fingerprint="f", weights={}, real_digest="d", labels=("naevus", "melanoma")
    )
    return plan.request(label, ordinal)


def table(tmp_path: Path, captions: list[Caption], name: str = "captions.lance") -> str:
    write_captions(str(tmp_path / name), captions)
    return str(tmp_path / name)


def test_training_rows_get_prefix_and_caption_with_placeholders(tmp_path: Path) -> None:
    source = CaptionTable(captions=table(tmp_path, [real(0)]), prefix_only=0.0)
    assert source.fit([row(0)]).describe(row(0)) == (
        "An image of <lesion> on <skin>. small <lesion> 0 on pale <skin>"
    )
    assert CaptionTable().compose("lesions, a skinny lesion") == (
        "An image of <lesion> on <skin>. lesions, a skinny <lesion>"
    )


def test_a_fixed_share_gets_the_prefix_alone(tmp_path: Path) -> None:
    count = 400
    uri = table(tmp_path, [real(i) for i in range(count)])
    fitted = CaptionTable(captions=uri).fit([row(i) for i in range(count)])
    alone = [fitted.describe(row(i)) == "An image of <lesion> on <skin>." for i in range(count)]
    assert 0.14 < np.mean(alone) < 0.26
    assert alone == [fitted.describe(row(i)) == "An image of <lesion> on <skin>." for i in range(count)]
    everyone = CaptionTable(captions=uri, prefix_only=1.0).fit([row(0)])
    assert everyone.describe(row(0)) == "An image of <lesion> on <skin>."


def test_requests_get_expanded_captions_of_their_class_else_real_training_ones(tmp_path: Path) -> None:
    captions = [
        real(0), real(1), real(9, split="val"), real(2, "melanoma"), real(3, "melanoma"),
        expanded_caption("melanoma", "new one", "recombination"),
    ]  # fmt: skip
    fitted = CaptionTable(captions=table(tmp_path, captions)).fit(
        [row(0), row(1), row(2, "melanoma"), row(3, "melanoma")]
    )
    drawn = [fitted.draw(request("melanoma", i), random_generator(str(i), "prompt"), None) for i in range(10)]
    assert {draw.prompt for draw in drawn} == {"An image of <lesion> on <skin>. new one"}
    assert {draw.parameters["caption_kind"] for draw in drawn} == {"expanded"}
    drawn = [fitted.draw(request("naevus", i), random_generator(str(i), "prompt"), None) for i in range(30)]
    assert {draw.parameters["caption_of"] for draw in drawn} == {
        "image-0",
        "image-1",
    }  # never the held-out one
    assert fitted.describe(row(9)) != ""  # which training validates with


def test_the_caption_fits_the_requested_mask(tmp_path: Path) -> None:
    places = {i: (0.1 + 0.2 * (i % 5), 0.1 + 0.2 * (i // 5)) for i in range(25)}
    captions = [
        real(i, attributes={"mask.area": "0.0300", "mask.x": f"{x:.4f}", "mask.y": f"{y:.4f}"})
        for i, (x, y) in places.items()
    ]
    uri = table(tmp_path, captions)
    rows = [row(i) for i in range(25)]
    mask = np.zeros((50, 50), np.uint8)
    mask[3:12, 38:48] = 1  # upper right
    fitted = CaptionTable(captions=uri, neighbours=3).fit(rows)
    drawn = {
        int(
            str(fitted.draw(request(), random_generator(str(i), "p"), mask).parameters["caption_of"]).split(
                "-"
            )[1]
        )
        for i in range(30)
    }
    assert len(drawn) == 3 and all(places[i][0] > 0.6 and places[i][1] < 0.4 for i in drawn)
    anywhere = CaptionTable(captions=uri, neighbours=0).fit(rows)
    spread = {anywhere.draw(request(), random_generator(str(i), "p"), mask).prompt for i in range(60)}
    assert len(spread) > 10


def test_the_digest_is_of_what_the_table_says(tmp_path: Path) -> None:
    one = CaptionTable(captions=table(tmp_path, [real(0), real(1)]))
    moved = CaptionTable(captions=table(tmp_path, [real(1), real(0)], "moved.lance"))
    other = CaptionTable(captions=table(tmp_path, [real(0), real(1, caption="another")], "other.lance"))
    assert one.weights() == moved.weights() != other.weights()
    assert set(one.weights()) == {"captions"}


def test_missing_tables_and_captions_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="factory caption --real"):
        CaptionTable().weights()
    with pytest.raises(FileNotFoundError, match=r"no table at .*factory caption"):
        CaptionTable(captions=str(tmp_path / "none.lance")).fit([row(0)])
    uri = table(tmp_path, [real(0), real(1, kind="error", caption="")])
    with pytest.raises(
        ValueError, match=r"no caption for 1 of 2 images \(first: image_id image-1\).*factory caption"
    ):
        CaptionTable(captions=uri).fit([row(0), row(1)])
    fitted = CaptionTable(captions=uri).fit([row(0)])
    with pytest.raises(ValueError, match="image-7"):
        fitted.describe(row(7))
    with pytest.raises(ValueError, match="melanoma"):
        fitted.draw(request("melanoma"), random_generator("a", "p"), None)


def test_bad_fields_are_named() -> None:
    for changes, name in (({"prefix": " "}, "prefix"), ({"prefix_only": 1.5}, "prefix_only"), ({"neighbours": -1}, "neighbours")):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            CaptionTable(**changes)  # type: ignore[arg-type]
