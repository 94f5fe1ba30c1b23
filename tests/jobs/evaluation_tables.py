"""A small real table in all splits and synthetic tables beside it, with embeddings that follow the pixels.

Pictures are blobs in noise, round or three times as long as wide.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from factory.embedding import EmbedderSpec
from factory.imaging import encode_png
from factory.storage import open_table, real_digest, write_table
from jobs.evaluate_plan import Args
from schemas.request import SynthesisPlan
from schemas.sample import RealSample, SyntheticSample, real_schema, synthetic_schema, table_of

CLASSES, SIZE, DIM = ("round", "long"), 24, 8
COUNTS = {"train": 24, "val": 8, "test": 24, "reserve": 24}
SPEC = EmbedderSpec(
    name="tiny", weights_digest="of the tests", dim=DIM, size=SIZE, mean=(0.5,) * 3, std=(0.25,) * 3
)
_PROJECTION = np.random.default_rng(0).normal(size=(SIZE * SIZE, DIM))


def picture(label: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A bright ellipse on noise, uint8 (24, 24), and its mask."""
    ys, xs = np.mgrid[:SIZE, :SIZE]
    angle, area = rng.uniform(0, np.pi), rng.uniform(35, 60)
    aspect = rng.uniform(1.0, 1.3) if label == 0 else rng.uniform(2.2, 3.0)
    a, b = np.sqrt(area * aspect / np.pi), np.sqrt(area / aspect / np.pi)
    cy, cx = rng.uniform(8, SIZE - 8, 2)
    u = (xs - cx) * np.cos(angle) + (ys - cy) * np.sin(angle)
    v = -(xs - cx) * np.sin(angle) + (ys - cy) * np.cos(angle)
    mask = ((u / a) ** 2 + (v / b) ** 2 < 1).astype(np.uint8)
    return (90 + 90 * mask + rng.normal(0, 40, mask.shape)).clip(0, 255).astype(np.uint8), mask


def embedding(pixels: np.ndarray) -> tuple[float, ...]:
    """A fixed random projection of the pixels, unit norm."""
    vector = (pixels.ravel() / 255 - 0.4) @ _PROJECTION
    return tuple((vector / np.linalg.norm(vector)).astype(np.float32).tolist())


def metadata() -> dict[str, str]:
    summary = {"unit": "image-group level, patients unknown", "shortcuts": {"all": 0.62}}
    return {
        "class_names": json.dumps(CLASSES),
        "embedder": SPEC.to_json(),
        "dataset": "blobs",
        "summary": json.dumps(summary),
    }


def write_real(
    folder: Path,
    counts: Mapping[str, int] = COUNTS,
    *,
    seed: int = 0,
    name: str = "real",
    copies: Sequence[tuple[str, int]] = (),
    class_names: Sequence[str] = CLASSES,
    every: int = 2,
    with_masks: bool = True,
) -> str:
    """`NAME.lance`, classes in turn, every image a patient of its own, two devices.

    Args:
        copies: (split, seed) of further rows with the pictures that a table of that seed begins with in train.
        class_names: what the classes are called; one name for both, or none: a table that knows no classes.
        every: one of so many rows is of the second class.
        with_masks: whether rows have their mask.
    """
    rng, rows = np.random.default_rng(seed), []
    wanted = [(split, rng) for split, count in counts.items() for _ in range(count)]
    wanted += [(split, np.random.default_rng(other)) for split, other in copies]
    for number, (split, source) in enumerate(wanted):
        shape = int(number % every == every - 1)
        label = min(shape, max(len(class_names) - 1, 0))
        image, mask = picture(shape, source)
        rows.append(
            RealSample(
                image_id=f"{seed:016x}{number:016x}", dataset="blobs", source_path=f"{number}.png",
                group_id=f"patient-{seed}-{number}", split=split, label=label,
                label_name=class_names[label] if class_names else "", image=encode_png(image),
                mask=encode_png(mask) if with_masks else None, height=SIZE, width=SIZE,
                device=("linear", "convex")[number // 2 % 2], licence="CC0-1.0", allowed_use="any",
                embedding=embedding(image),
            )
        )  # fmt: skip
    schema, told = real_schema(DIM), metadata() | {"class_names": json.dumps(list(class_names))}
    if not class_names:
        del told["class_names"]
    return write_table(str(folder / f"{name}.lance"), table_of(rows, schema), schema, metadata=told).uri


def write_synthetic(
    folder: Path,
    real: str,
    *,
    count: int = 60,
    seed: int = 1,
    name: str = "synthetic",
    backwards: bool = False,
    label: int | None = None,
    derived_from: int = 0,
    brighter: int = 0,
) -> str:
    """`NAME.lance` of one generator, every ninth row rejected.

    Args:
        backwards: the order of writing.
        label: rows of this class only.
        derived_from: rows keep the pixels of so many real images.
        brighter: grey levels added to every image.
    """
    plan = SynthesisPlan(
        recipe="tiny", fingerprint="f", weights={"unet": f"w{seed}"}, real_digest=real_digest(open_table(real)),
        seed=seed, labels=CLASSES,
    )  # fmt: skip
    rows = []
    for index in range(count):
        request = plan.request_at(index)
        if label is not None and request.label_index != label:
            continue
        image, mask = picture(request.label_index, np.random.default_rng([seed, index]))
        image = np.clip(image.astype(int) + brighter, 0, 255).astype(np.uint8)
        rows.append(
            SyntheticSample(
                request_id=request.request_id, plan_id=plan.plan_id, request_index=index, attempt=0,
                recipe="tiny", fingerprint="f", weights=dict(plan.weights), seed=seed, label=request.label_index,
                label_name=request.label, prompt="", requested_mask=None, mask=encode_png(mask),
                image=encode_png(image), height=SIZE, width=SIZE, licence="CC0-1.0", num_inference_steps=1,
                guidance_scale=1.0, batch_size=1, embedding=embedding(image), code_version="0",
                stream_reject_reason="blank_image" if index % 9 == 8 else None,
                derived=bool(derived_from), group_id=f"patient-0-{index % derived_from}" if derived_from else None,
                background_id=f"background-{index % derived_from}" if derived_from else None,
            )
        )  # fmt: skip
    record = {"recipe": "tiny", "seed": seed, "real_digest": plan.real_digest, "fingerprint": "f",
              "weights": dict(plan.weights), "overrides": []}  # fmt: skip
    schema = synthetic_schema(DIM)
    told = {k: v for k, v in metadata().items() if k in ("class_names", "embedder")}
    told[f"plan.{plan.plan_id}"] = json.dumps(record)
    ordered = rows[::-1] if backwards else rows
    return write_table(str(folder / f"{name}.lance"), table_of(ordered, schema), schema, metadata=told).uri


def downstream(real: str, synthetic: str, out: Path, **changes: object) -> Args:
    """Arguments of a small `factory evaluate downstream` in this process."""
    values: dict = {
        "task": "classification", "model": "small_cnn?width=4", "ratio": ("1",), "seeds": 2, "size": 24,
        "num_steps": 10, "batch_size": 8, "validate_every": 5, "arms": "strong_augmentation,shuffled_labels,ungated,oracle",
        "in_process": True, "num_resamples": 200, "opened_by": "a tester",
        "reason": "to see", **changes,
    }  # fmt: skip
    return Args(real=real, synthetic=(synthetic,), out=str(out), **values)
