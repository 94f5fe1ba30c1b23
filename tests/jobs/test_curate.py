"""`factory curate` on real tables: copies and duplicates are marked, nothing is dropped or rewritten."""

import base64
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from factory.curation.planted import Power, planted_copy
from factory.datasets.phantom import PhantomConfig, phantom_sample
from factory.embedding import EmbedderSpec
from factory.imaging import decode_png, encode_png
from factory.storage import Table, open_table, write_table
from jobs import cli
from jobs.curate import Args, CurationResult, print_result, run
from schemas.request import SynthesisPlan
from schemas.sample import RealSample, SyntheticSample, real_schema, synthetic_schema, table_of

SIDE = 8
DIM = SIDE * SIDE
LABELS = ("benign", "malignant")
PLAN = SynthesisPlan(recipe="tiny", fingerprint="f", weights={}, real_digest="r", labels=LABELS)
SPEC = EmbedderSpec(name="tiny", weights_digest="d" * 32, dim=DIM, size=SIDE, mean=(0.0,) * 3, std=(1.0,) * 3)
TRAIN, VAL = 30, 22


@dataclass(frozen=True)
class Row:
    """A synthetic row to write."""

    image: np.ndarray
    mask: np.ndarray | None = None
    stream: str | None = None
    position: float | None = 0.5
    derived_from: str | None = None
    scores: Mapping[str, float] | None = None


def blocks(image: np.ndarray) -> tuple[float, ...]:
    """A small real embedding: block means of the middle, unit norm."""
    grey = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX), np.float32).ravel()
    centred = grey - grey.mean()
    return tuple((centred / np.linalg.norm(centred)).tolist())


def phantoms(seed: int, count: int) -> list[Row]:
    samples = [phantom_sample(PhantomConfig(), seed, index) for index in range(count)]
    return [Row(sample.image, sample.mask) for sample in samples]


def metadata(spec: EmbedderSpec = SPEC) -> dict[str, str]:
    return {"class_names": json.dumps(LABELS), "embedder": spec.to_json()}


def write_real(uri: Path, rows: Sequence[Row], num_train: int, spec: EmbedderSpec = SPEC) -> str:
    samples = [
        RealSample(
            image_id=f"{number:032x}",
            dataset="phantom",
            source_path=f"{number}.png",
            group_id=f"group-{number}",
            split="train" if number < num_train else "val",
            label=number % 2,
            label_name=LABELS[number % 2],
            image=encode_png(row.image),
            mask=None if row.mask is None else encode_png(row.mask),
            height=row.image.shape[0],
            width=row.image.shape[1],
            licence="CC0",
            allowed_use="tests",
            embedding=blocks(row.image),
        )
        for number, row in enumerate(rows)
    ]
    schema = real_schema(DIM)
    write_table(str(uri), table_of(samples, schema), schema, metadata=metadata(spec))
    return str(uri)


def write_synthetic(
    uri: Path,
    rows: Sequence[Row],
    order: Sequence[int] | None = None,
    more_metadata: Mapping[str, str] | None = None,
) -> str:
    samples = []
    for index in order if order is not None else range(len(rows)):
        row, request = rows[index], PLAN.request_at(index)
        samples.append(
            SyntheticSample(
                request_id=request.request_id,
                plan_id=PLAN.plan_id,
                request_index=index,
                attempt=0,
                recipe="tiny",
                fingerprint="f",
                weights={"unet": "w"},
                seed=0,
                label=request.label_index,
                label_name=request.label,
                prompt="",
                requested_mask=None,
                mask=None if row.mask is None else encode_png(row.mask),
                image=encode_png(row.image),
                height=row.image.shape[0],
                width=row.image.shape[1],
                licence="CC0",
                num_inference_steps=4,
                guidance_scale=1.0,
                batch_size=4,
                embedding=blocks(row.image),
                scores=row.scores or ({} if row.position is None else {"similarity_position": row.position}),
                stream_reject_reason=row.stream,
                derived=row.derived_from is not None,
                group_id=row.derived_from,
                code_version="0",
            )
        )
    schema = synthetic_schema(DIM)
    write_table(str(uri), table_of(samples, schema), schema, metadata=metadata() | dict(more_metadata or {}))
    return str(uri)


def request_id(index: int) -> str:
    return PLAN.request_at(index).request_id


def verdicts(table: Table) -> dict[int, dict]:
    """Curation columns by request_index."""
    names = ["reject_reason", "accepted", "duplicate_of", "nearest_real", "nearest_real_similarity"]
    return {row.pop("request_index"): row for row in table.read(["request_index", *names]).to_pylist()}


REAL = phantoms(21, TRAIN + VAL)
FRESH = phantoms(22, 8)


def table_rows() -> list[Row]:
    """0-5 fresh; 6 repeats 1 and lies deeper in the band; 7, 8 copies; 9, 10 rejected by the stream, 10 a copy."""
    rng = np.random.default_rng(0)
    copies = [planted_copy(kind, REAL[k].image, REAL[k].mask, rng) for kind, k in
              (("shift", 3), ("mirror", 17), ("brightness_contrast", 9))]  # fmt: skip
    darker = (FRESH[1].image * 0.9).astype(np.uint8)
    return [
        *(Row(row.image, row.mask, position=0.9) for row in FRESH[:6]),
        Row(darker, FRESH[1].mask, position=0.6),
        Row(*copies[0]),
        Row(*copies[1]),
        Row(FRESH[6].image, None, stream="empty_mask"),
        Row(*copies[2], stream="too_similar_to_real"),
    ]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_real(tmp_path_factory.mktemp("curate") / "real.lance", REAL, TRAIN)


@pytest.fixture(scope="module")
def curated(real: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, CurationResult, int]:
    """Table, result, and the bytes of data files before."""
    folder = tmp_path_factory.mktemp("curated")
    uri = write_synthetic(folder / "synthetic.lance", table_rows())
    before = size_of(uri)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        result = run(
            Args(
                table=uri,
                real=real,
                duplicate_similarity=0.99,
                planted=0,
                num_threads=2,
                report=str(folder / "report"),
            )
        )
    return uri, result, before


def size_of(uri: str) -> int:
    return sum(path.stat().st_size for path in Path(uri, "data").rglob("*") if path.is_file())


def test_planted_copies_of_training_images_are_caught(curated: tuple[str, CurationResult, int]) -> None:
    uri, result, _ = curated
    rows = verdicts(open_table(uri))
    for index, source in ((7, 3), (8, 17), (10, 9)):
        assert rows[index]["reject_reason"] == "near_copy_of_real"
        assert rows[index]["nearest_real"] == f"{source:032x}"
        assert rows[index]["accepted"] is False
    assert result.rejected["near_copy_of_real"] == 3
    first = result.pairs[0]
    assert first.correlation is not None and first.correlation > 0.8
    assert {pair.request_id for pair in result.pairs[:3]} == {request_id(k) for k in (7, 8, 10)}
    assert result.false_alarm is not None and result.false_alarm <= 0.05


def test_of_duplicates_the_best_is_kept(curated: tuple[str, CurationResult, int]) -> None:
    rows = verdicts(open_table(curated[0]))
    assert rows[1]["reject_reason"] == "duplicate_of_synthetic" and rows[1]["duplicate_of"] == request_id(6)
    assert rows[6]["accepted"] is True and rows[6]["duplicate_of"] is None


def test_the_streams_verdict_stands_and_the_rest_is_accepted(
    curated: tuple[str, CurationResult, int],
) -> None:
    uri, result, _ = curated
    rows = verdicts(open_table(uri))
    assert rows[9]["reject_reason"] == "empty_mask" and rows[9]["accepted"] is False
    accepted = {index for index, row in rows.items() if row["accepted"]}
    assert accepted == {0, 2, 3, 4, 5, 6}
    assert (result.total, result.accepted) == (11, 6)
    assert sum(result.rejected.values()) == 5
    assert {label: sum(counts.values()) for label, counts in result.by_class.items()} == {
        "benign": 6,
        "malignant": 5,
    }
    assert all(row["nearest_real"] and -1 <= row["nearest_real_similarity"] <= 1.001 for row in rows.values())


def test_a_tagged_version_is_made_and_no_image_rewritten(curated: tuple[str, CurationResult, int]) -> None:
    uri, result, before = curated
    table = open_table(uri, tag=result.tag)
    assert result.tag == "curated-1" and table.version == result.version
    assert table.count("accepted") == 6
    record = json.loads(table.metadata[f"curation.{result.tag}"])
    assert record["duplicate_similarity"] == 0.99 and set(record["copy_thresholds"]) == {"frame", "lesion"}
    assert size_of(uri) - before < 40_000


def test_the_order_of_rows_changes_nothing(
    curated: tuple[str, CurationResult, int], real: str, tmp_path: Path
) -> None:
    order = np.random.default_rng(1).permutation(len(table_rows())).tolist()
    uri = write_synthetic(tmp_path / "shuffled.lance", table_rows(), order)
    result = run(Args(table=uri, real=real, duplicate_similarity=0.99, planted=0, num_threads=1))
    assert verdicts(open_table(uri)) == verdicts(open_table(curated[0]))
    assert result.pairs == curated[1].pairs


def test_curating_again_makes_another_tag_and_leaves_the_first(
    real: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = write_synthetic(tmp_path / "synthetic.lance", table_rows())
    assert cli.main(["curate", uri, "--real", real, "--no-copy-test", "--duplicate-similarity", "0.99"]) == 0
    assert "accepted 8 of 11 (73%)" in capsys.readouterr().out
    assert cli.main(["curate", uri, "--real", real, "--no-copy-test", "--duplicate-similarity", "1.0"]) == 0
    out = capsys.readouterr().out
    assert "tag curated-2" in out and f'factory query {uri} "accepted" --tag curated-2' in out
    assert open_table(uri, tag="curated-1").count("accepted") == 8
    assert open_table(uri).count("accepted") == 9


def test_the_duplicate_threshold_comes_from_training_rows(real: str, tmp_path: Path) -> None:
    uri = write_synthetic(tmp_path / "synthetic.lance", table_rows())
    result = run(Args(table=uri, real=real, copy_test=False))
    vectors = np.array([blocks(row.image) for row in REAL[:TRAIN]])
    similarity = vectors @ vectors.T - 2 * np.eye(TRAIN)
    assert result.duplicate_similarity == pytest.approx(np.quantile(similarity.max(1), 0.999), abs=1e-5)


def test_an_empty_table_is_curated(real: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = write_synthetic(tmp_path / "synthetic.lance", [])
    result = run(Args(table=uri, real=real))
    print_result(result)
    assert (result.total, result.accepted, result.pairs) == (0, 0, [])
    assert "accepted 0 of 0" in capsys.readouterr().out
    assert {"accepted", "reject_reason"} <= set(open_table(uri).schema.names)


def test_the_background_of_a_derived_row_is_no_copy(real: str, tmp_path: Path) -> None:
    """A real image with another lesion painted in, declared as derived from its group."""
    image, mask = REAL[5].image.copy(), REAL[5].mask
    assert mask is not None
    rows, columns = np.nonzero(mask)
    box = (
        slice(max(rows.min() - 5, 0), rows.max() + 5),
        slice(max(columns.min() - 5, 0), columns.max() + 5),
    )
    image[box] = FRESH[0].image[box]
    uri = write_synthetic(
        tmp_path / "synthetic.lance", [Row(image, mask, derived_from="group-5"), Row(image, mask)]
    )
    result = run(Args(table=uri, real=real, planted=0, duplicate_similarity=1.0))
    found = verdicts(open_table(uri))
    assert found[0]["accepted"] is True and found[0]["nearest_real"] != f"{5:032x}"
    assert found[1]["reject_reason"] == "near_copy_of_real" and found[1]["nearest_real"] == f"{5:032x}"
    assert result.accepted == 1


def test_bad_input_is_named(real: str, tmp_path: Path) -> None:
    uri = write_synthetic(tmp_path / "synthetic.lance", table_rows())
    other = EmbedderSpec(
        name="timm:other", weights_digest="e" * 32, dim=DIM, size=SIDE, mean=(0.0,), std=(1.0,)
    )
    strange = write_real(tmp_path / "strange.lance", REAL[:2], 2, other)
    with pytest.raises(ValueError, match=r"timm:other .* does not compare with tiny"):
        run(Args(table=uri, real=strange))
    with pytest.raises(ValueError, match="not a synthetic table"):
        run(Args(table=real, real=real))
    with pytest.raises(ValueError, match="not a table of real images"):
        run(Args(table=uri, real=uri))
    with pytest.raises(FileNotFoundError, match="factory synthesize"):
        run(Args(table=str(tmp_path / "no_synthetic.lance"), real=real))
    few = write_real(tmp_path / "few.lance", REAL[:4], 4)
    with pytest.raises(ValueError, match="--copy-correlation or --no-copy-test"):
        run(Args(table=uri, real=few))
    with pytest.raises(ValueError, match="--duplicate-quantile"):
        run(Args(table=uri, real=real, duplicate_quantile=1.5))


def test_copies_of_real_ultrasound_are_caught(busi_folder: Path, tmp_path: Path) -> None:
    rows = []
    for path in sorted(p for p in (busi_folder / "malignant").glob("*.png") if "_mask" not in p.name)[::6]:
        mask = np.asarray(Image.open(path.with_name(path.stem + "_mask.png")).convert("L"))
        rows.append(Row(np.asarray(Image.open(path).convert("L")), (mask > 0).astype(np.uint8)))
    real, held_out = rows[:28], rows[28:]
    rng = np.random.default_rng(0)
    planted = [Row(*planted_copy(kind, real[k].image, real[k].mask, rng))
               for kind, k in (("crop_90", 2), ("speckle", 11), ("jpeg_75", 20))]  # fmt: skip
    uri = write_synthetic(tmp_path / "synthetic.lance", [*planted, *held_out])
    run(
        Args(
            table=uri, real=write_real(tmp_path / "real.lance", real, 28), planted=0, duplicate_similarity=1.0
        )
    )
    found = verdicts(open_table(uri))
    for index, source in ((0, 2), (1, 11), (2, 20)):
        assert found[index]["reject_reason"] == "near_copy_of_real"
        assert found[index]["nearest_real"] == f"{source:032x}"
    assert sum(not row["accepted"] for row in found.values()) == 3


def test_the_measured_power_is_told(
    real_table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the shipped embedder, as `factory prepare` used it."""
    from factory.imaging import decode_png

    table = open_table(real_table)
    row = table.read(["image", "mask", "embedding"], "split = 'train'", limit=1).to_pylist()[0]
    dim = table.schema.field("embedding").type.list_size
    sample = SyntheticSample(
        request_id=request_id(0), plan_id=PLAN.plan_id, request_index=0, attempt=0, recipe="tiny",
        fingerprint="f", weights={}, seed=0, label=0, label_name="benign", prompt="", requested_mask=None,
        mask=row["mask"], image=row["image"], height=decode_png(row["image"]).shape[0], width=128,
        licence="CC0", num_inference_steps=4, guidance_scale=1.0, batch_size=1,
        embedding=tuple(row["embedding"]), code_version="0",
    )  # fmt: skip
    schema = synthetic_schema(dim)
    keys = {"class_names": json.dumps(LABELS), "embedder": table.metadata["embedder"]}
    uri = str(tmp_path / "synthetic.lance")
    write_table(uri, table_of([sample], schema), schema, metadata=keys)
    result = run(Args(table=uri, real=real_table, planted=3))
    print_result(result)
    assert result.power is not None and min(result.power.detected.values()) >= 2 / 3
    assert result.rejected == {"near_copy_of_real": 1}
    assert "of planted copies of 3 training images it finds: brightness_contrast" in capsys.readouterr().out
    blind = Power(detected={"jpeg_75": 1.0, "shift": 0.1}, attributed=0.0, num_images=3)
    print_result(dataclasses.replace(result, rejected={}, power=blind))
    warned = capsys.readouterr().out
    assert "WARNING: the copy test misses most planted copies of kind shift," in warned
    assert "not detected" not in warned


def test_a_generator_that_lies_closer_to_its_training_images_is_told(
    real: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An overfitted generator is flagged without any single row being called a copy."""
    rng = np.random.default_rng(1)
    blurred = [
        np.clip(REAL[k % TRAIN].image + rng.normal(0, 12, REAL[0].image.shape), 0, 255).astype(np.uint8)
        for k in range(2 * TRAIN)
    ]
    overfitted = write_synthetic(tmp_path / "overfitted.lance", [Row(image) for image in blurred])
    result = run(Args(table=overfitted, real=real, copy_test=False, duplicate_similarity=1.0))
    print_result(result)
    assert "it memorises" in capsys.readouterr().out
    recorded = json.loads(open_table(overfitted).metadata["memorisation.curated-1"])
    assert recorded["verdict"] == "memorising" and recorded["p_value"] <= 0.01
    assert recorded["num_references"] == VAL and recorded["planted"]["0.2"] <= 0.05

    honest = write_synthetic(tmp_path / "honest.lance", phantoms(29, 40))
    result = run(Args(table=honest, real=real, copy_test=False, duplicate_similarity=1.0))
    print_result(result)
    out = capsys.readouterr().out
    assert "it memorises" not in out and "closeness to training images: cosine" in out
    assert json.loads(open_table(honest).metadata["memorisation.curated-1"])["verdict"] == "not detected"


def test_rows_on_a_patients_background_are_not_tested_for_closeness(real: str, tmp_path: Path) -> None:
    uri = write_synthetic(
        tmp_path / "derived.lance", [Row(REAL[5].image, REAL[5].mask, derived_from="group-5")]
    )
    result = run(Args(table=uri, real=real, copy_test=False))
    assert result.closeness.outcome is None and "derived from training images" in result.closeness.note
    assert "derived" in json.loads(open_table(uri).metadata["memorisation.curated-1"])["not_done"]


def section(page: str, title: str) -> str:
    return page.split(f"<h2>{title}</h2>")[1].split("</section>")[0]


def test_the_report_shows_the_copies_beside_what_they_were_copied_from(
    curated: tuple[str, CurationResult, int],
) -> None:
    _, result, _ = curated
    assert result.report is not None
    page = Path(result.report).read_text()
    assert "<title>Memorisation: 3 near-copies of training images found</title>" in page
    assert 'src="http' not in page and "<script" not in page
    worst = section(page, "Worst pairs")
    assert worst.count("<figure>") == 11 and len(re.findall(r"<figcaption>[^<]*, COPY", worst)) == 3
    pixels = [decode_png(base64.b64decode(text)) for text in re.findall(r"base64,([^\"]+)", worst)]
    # Three crops and two gaps; a copy differs less from what it was registered to than fresh images from the nearest.
    assert all(image.shape == (160, 488) for image in pixels)
    difference = [float(image[:, 328:].mean()) for image in pixels]
    assert max(difference[:3]) < 0.7 * min(difference[3:])
    assert "27.27%" in section(page, "Summary") and "near_copy_of_real" in section(page, "Verdicts per class")
    assert "<svg" in section(page, "Distance to training and to held-out images")
    assert "to held-out images" in section(page, "Distance to training and to held-out images")


def test_a_report_without_findings_says_not_detected_and_never_passed(real: str, tmp_path: Path) -> None:
    rows = [Row(row.image, row.mask) for row in phantoms(29, 12)]
    uri = write_synthetic(tmp_path / "clean.lance", rows)
    result = run(Args(table=uri, real=real, planted=0, duplicate_similarity=1.0, report=str(tmp_path / "r")))
    page = Path(str(result.report)).read_text()
    assert "<title>Memorisation: not detected</title>" in page and "passed" not in page
    blind = run(Args(table=uri, real=write_real(tmp_path / "few.lance", REAL[:4], 4), copy_test=False,
                     duplicate_similarity=1.0, report=str(tmp_path / "b")))  # fmt: skip
    assert "<title>Memorisation: not tested</title>" in Path(str(blind.report)).read_text()


def test_verdicts_of_the_stream_are_judged_again_from_stored_scores(
    real: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from factory.curation.filters import FilterBatch, first_reasons
    from factory.imaging import decode_rows
    from factory.storage import real_digest, real_rows
    from jobs.recipe_args import parse_recipe
    from jobs.synthesis_plan import fit_filters

    stored = real_rows(real)
    recipe = parse_recipe("tiny")
    vectors = np.stack(stored["embedding"].to_numpy(zero_copy_only=False)).astype(np.float32)
    filters = fit_filters(recipe, decode_rows(stored, recipe.generator.resolution), vectors, SPEC)
    images = [row.image for row in FRESH[:6]] + [FRESH[0].image // 12 + 90]
    masks = [row.mask for row in FRESH[:6]] + [FRESH[0].mask]
    labels = np.array([PLAN.request_at(k).label_index for k in range(7)])
    embeddings = np.array([blocks(image) for image in images], np.float32)
    batch = FilterBatch(
        images=images, requested_masks=masks, masks=masks, labels=labels, embeddings=embeddings
    )
    scores: dict[str, np.ndarray] = {}
    for item in filters:
        scores |= item.score(batch)
    stream = first_reasons(filters, scores, len(images))
    rows = [
        Row(image, mask, stream=None if reason is None else str(reason), scores={n: float(v[k]) for n, v in scores.items()})
        for k, (image, mask, reason) in enumerate(zip(images, masks, stream))
    ]  # fmt: skip
    assert stream[6] == "blank_image" and None in stream
    plan = {"recipe": "tiny", "overrides": [], "real_digest": real_digest(open_table(real))}
    uri = str(tmp_path / "synthetic.lance")
    write_synthetic(Path(uri), rows, more_metadata={f"plan.{PLAN.plan_id}": json.dumps(plan)})
    arguments = [
        "curate",
        uri,
        "--real",
        real,
        "--no-copy-test",
        "--duplicate-similarity",
        "1.0",
        "--rejudge",
    ]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "judged again from stored scores: 0 rows" in out and "judged otherwise" not in out
    assert cli.main([*arguments, "--threshold", "BlankImage.margin=50"]) == 0
    table = open_table(uri)
    stored_reasons = table.read(["request_index", "stream_reject_reason", "reject_reason"]).to_pylist()
    by_index = {row["request_index"]: row for row in stored_reasons}
    assert by_index[6]["stream_reject_reason"] == "blank_image", "the stream's column never changes"
    assert by_index[6]["reject_reason"] is None
    record = json.loads(table.metadata["curation.curated-2"])["rejudged"]
    assert record["changed"] == 1 and record["thresholds"] == ["BlankImage.margin=50"]
    other = write_real(tmp_path / "other.lance", REAL[1:], TRAIN - 1)
    with pytest.raises(ValueError, match="made with other real rows"):
        run(Args(table=uri, real=other, copy_test=False, duplicate_similarity=1.0, rejudge=True))
