"""`factory caption`: from a real table to prompts, by template, by models, and by recombination."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from factory.captions.table import read_captions
from factory.datasets.skin_phantom import MELANOMA, NAEVUS, skin_sample
from factory.imaging import decode_rows, encode_png
from factory.sources.captions import CaptionTable
from jobs.caption import Args, command, run
from schemas.sample import RealSample, real_schema, table_of

LABELS = (NAEVUS, MELANOMA)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> str:
    from factory.storage import write_table

    rows = []
    for i in range(28):
        sample = skin_sample(96, 0, i)
        rows.append(
            RealSample(
                image_id=f"{i:032x}",
                dataset="skin",
                source_path=f"{i}.png",
                group_id=str(i),
                split="train" if i < 20 else "val" if i < 24 else "test",
                label=LABELS.index(sample.label_name),
                label_name=sample.label_name,
                image=encode_png(sample.image),
                mask=encode_png(sample.mask),
                height=96,
                width=96,
                licence="none",
                allowed_use="tests",
                embedding=(1.0, 0.0),
            )
        )
    uri = str(tmp_path_factory.mktemp("real") / "real.lance")
    schema = real_schema(2)
    write_table(uri, table_of(rows, schema), schema, metadata={"class_names": json.dumps(LABELS)})
    return uri


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tokenizer and text encoder's config with room for 77 tokens."""
    from factory.assets.base_models import save_tokenizer

    folder = tmp_path_factory.mktemp("base")
    save_tokenizer(folder / "tokenizer", 77)
    (folder / "text_encoder").mkdir()
    (folder / "text_encoder" / "config.json").write_text(json.dumps({"max_position_embeddings": 77}))
    return str(folder)


def caption(real: str, base: str, out: Path, **changes: Any) -> Any:
    return run(Args(real=real, out=str(out), overrides=("--generator.base", base), **changes))


def test_template_captions_cover_train_and_val_and_feed_the_source(
    real: str, base: str, tmp_path: Path
) -> None:
    from factory.storage import real_rows
    from jobs.caption import _COLUMNS

    out = tmp_path / "captions.lance"
    summary = caption(real, base, out)
    assert summary.counts == {"real": 24}
    captions = read_captions(str(out))
    assert {c.split for c in captions} == {"train", "val"}  # the test split is never read
    assert all(c.label_name in c.caption and c.captioner == "template" for c in captions)
    assert len({c.caption for c in captions}) > 12
    rows = decode_rows(real_rows(real, splits=("train",), columns=_COLUMNS), 64)
    fitted = CaptionTable(captions=str(out), prefix_only=0.0).fit(rows)
    assert all(fitted.describe(row).startswith("An image of <lesion> on <skin>. ") for row in rows)
    again = tmp_path / "again.lance"
    caption(real, base, again)
    assert CaptionTable(captions=str(again)).weights() == CaptionTable(captions=str(out)).weights()


def test_captions_keep_within_the_text_encoder(real: str, base: str, tmp_path: Path) -> None:
    from factory.captions.budget import TokenBudget

    summary = caption(real, base, tmp_path / "c.lance")
    budget = TokenBudget(Path(base), ("<lesion>", "<skin>"))
    lengths = [
        budget.count(CaptionTable().compose(c.caption)) for c in read_captions(str(tmp_path / "c.lance"))
    ]
    assert max(lengths) <= 77 and summary.shortened > 0  # words are spelt out by this tokenizer


def test_expand_adds_new_captions_per_class_and_replaces_earlier_ones(
    real: str, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "captions.lance")
    caption(real, base, Path(out))
    before = {c.caption for c in read_captions(out)}
    arguments = ["--captions", out, "--generator.base", base]
    assert command(["--expand", "6", *arguments]) == 0
    assert "12 expanded, 24 real" in capsys.readouterr().out, "six of each class"
    expanded = [c for c in read_captions(out) if c.kind == "expanded"]
    assert {label: sum(c.label_name == label for c in expanded) for label in LABELS} == {
        NAEVUS: 6,
        MELANOMA: 6,
    }
    assert not before & {c.caption for c in expanded}
    assert command(["--expand", "3", *arguments]) == 0
    captions = read_captions(out)
    assert sum(c.kind == "expanded" for c in captions) == 6 and sum(c.kind == "real" for c in captions) == 24


@pytest.mark.soak
def test_a_vision_language_model_over_ray_and_a_language_model(
    real: str, base: str, tmp_path: Path, ray_local: None
) -> None:
    from tiny_transformers import write_language_model, write_vlm

    model = write_vlm(tmp_path / "vlm")
    out = tmp_path / "captions.lance"
    summary = caption(real, base, out, captioner=f"vlm:{model}")
    assert summary.counts == {"real": 24}
    captions = read_captions(str(out))
    assert all(c.caption.startswith(c.label_name) and "mask.x" in c.attributes for c in captions)
    writer = write_language_model(tmp_path / "lm")
    run(Args(expand=2, captions=str(out), language_model=str(writer), overrides=("--generator.base", base)))
    expanded = [c for c in read_captions(str(out)) if c.kind == "expanded"]
    assert expanded and {c.captioner for c in expanded} == {f"lm:{writer}"}


def test_failures_are_rows_of_their_own_and_stop_the_job_above_a_share(
    real: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import jobs.caption

    def answers(args: Args, table: Any) -> dict[str, tuple[str, str | None]]:
        ids = table["image_id"].to_pylist()
        return {
            name: ("", "the model answered ''") if n < 2 else ("a dark lesion", None)
            for n, name in enumerate(ids)
        }

    monkeypatch.setattr(jobs.caption, "_answers", answers)
    with pytest.raises(
        ValueError, match=r"failed for 2 of 24 images .*--max-failed 0\.02; nothing was written"
    ):
        caption(real, base, tmp_path / "a.lance", captioner="vlm:owner/name")
    assert not (tmp_path / "a.lance").exists()
    summary = caption(real, base, tmp_path / "b.lance", captioner="vlm:owner/name", max_failed=0.1)
    assert summary.counts == {"real": 22, "error": 2}
    failed = [c for c in read_captions(str(tmp_path / "b.lance")) if c.kind == "error"]
    assert all(c.caption == "" and c.error for c in failed)
    assert len(CaptionTable(captions=str(tmp_path / "b.lance"))._read()) == 22


def test_wrong_options_are_named_before_any_work(real: str, base: str, tmp_path: Path) -> None:
    out = str(tmp_path / "c.lance")
    override = ("--generator.base", base)
    for args, match in (
        (Args(), "give --real and --out"),
        (Args(real=real, out=out, captioner="blip"), "want template or vlm"),
        (Args(real=real, out=out, language_model="a/b"), "go with --expand"),
        (Args(expand=3), "give the table as --captions"),
        (Args(expand=0, captions=out), "at least 1"),
        (Args(real=real, out=out, recipe="tiny"), "no CaptionTable"),
        (
            Args(real=real, out=out, overrides=(*override, "--prompts.prefix", "<lesion> <skin> " * 45)),
            "text encoder takes 77",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            run(args)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        run(Args(real=real, out=out, captioner="vlm:./none", overrides=override))
    caption(real, base, Path(out))
    with pytest.raises(FileExistsError, match="--overwrite"):
        caption(real, base, Path(out))


def test_colour_images_stay_in_colour(real: str) -> None:
    from factory.storage import real_rows
    from jobs.caption import _COLUMNS

    rows = decode_rows(real_rows(real, splits=("val",), columns=_COLUMNS), 64)
    assert all(row.image.shape == (64, 64, 3) and np.ptp(row.image, axis=2).max() > 20 for row in rows)
