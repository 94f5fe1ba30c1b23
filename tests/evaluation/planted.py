"""A planted truth: noisy blobs whose class hangs on their texture, and generators that are good, bad, or no help."""

import json
from pathlib import Path
from typing import Literal

import numpy as np

from factory.imaging import Letterbox, decode_png, encode_png
from factory.predictors.examples import Examples, NativeTruth
from factory.storage import open_table, real_digest, real_rows, write_table
from schemas.request import SynthesisPlan
from schemas.sample import RealSample, SyntheticSample, real_schema, synthetic_schema, table_of

CLASSES = ("bright", "striped")
SIZE = 24
Quality = Literal["good", "bad", "copies"]


def picture(label: int, rng: np.random.Generator, noise: float = 40.0) -> tuple[np.ndarray, np.ndarray]:
    """A lesion on noise, uint8 (24, 24), and its mask: bright in the first class, striped in the second."""
    ys, xs = np.mgrid[:SIZE, :SIZE]
    angle, area, aspect = rng.uniform(0, np.pi), rng.uniform(40, 90), rng.uniform(1, 1.6)
    a, b = np.sqrt(area * aspect / np.pi), np.sqrt(area / aspect / np.pi)
    cy, cx = rng.uniform(8, SIZE - 8, 2)
    u = (xs - cx) * np.cos(angle) + (ys - cy) * np.sin(angle)
    v = -(xs - cx) * np.sin(angle) + (ys - cy) * np.cos(angle)
    mask = ((u / a) ** 2 + (v / b) ** 2 < 1).astype(np.uint8)
    inside = 60.0 if label == 0 else 60 * np.sign(np.sin(1.6 * xs + rng.uniform(0, 6)))
    pixels = 100 + rng.uniform(-25, 25) + mask * inside + rng.normal(0, noise, mask.shape)
    return pixels.clip(0, 255).astype(np.uint8), mask


def pictures(
    name: str,
    per_class: tuple[int, int],
    seed: int,
    *,
    is_real: bool = True,
    wrong_labels: bool = False,
    native: bool = False,
) -> Examples:
    """Rows called name-0, name-1, …, classes in turn where there are as many of each."""
    rng = np.random.default_rng(seed)
    labels = [label for label, count in enumerate(per_class) for _ in range(count)]
    labels = [labels[k] for k in rng.permutation(len(labels))]
    made = [picture(label, rng) for label in labels]
    ids = tuple(f"{name}-{number}" for number in range(len(labels)))
    box = Letterbox(height=SIZE, width=SIZE, size=SIZE)
    return Examples(
        images=np.stack([image for image, _ in made])[..., None],
        labels=np.array([1 - label if wrong_labels else label for label in labels], np.int64),
        class_names=CLASSES,
        ids=ids,
        groups=tuple(f"group of {one}" for one in ids),
        is_real=np.full(len(ids), is_real),
        masks=np.stack([mask for _, mask in made]),
        native=tuple(NativeTruth(letterbox=box, mask=mask) for _, mask in made) if native else None,
    )


def write_real(path: Path, counts: dict[str, int], seed: int, *, scrambled: str = "") -> str:
    """A real table with so many rows of each split, classes half and half.

    `scrambled` names a split whose pixels, masks and labels are noise, everything else as before.
    """
    rng, rows = np.random.default_rng(seed), []
    for split, count in counts.items():
        for number in range(count):
            image, mask = picture(number % 2, rng)
            label = number % 2
            if split == scrambled:
                noise = np.random.default_rng([seed, number])
                image = noise.integers(0, 256, image.shape, np.uint8)
                mask = noise.integers(0, 2, mask.shape).astype(np.uint8)
                label = int(noise.integers(2))
            rows.append(
                RealSample(
                    image_id=f"{split}-{number:03d}", dataset="blobs", source_path=f"{split}/{number}.png",
                    group_id=f"patient of {split}-{number:03d}", split=split, label=label,
                    label_name=CLASSES[label], image=encode_png(image), mask=encode_png(mask), height=SIZE,
                    width=SIZE, licence="none", allowed_use="tests", embedding=(1.0, 0.0),
                )
            )  # fmt: skip
    schema = real_schema(2)
    metadata = {"class_names": json.dumps(CLASSES)}
    write_table(str(path), table_of(rows, schema), schema, metadata=metadata)
    return str(path)


def write_synthetic(
    path: Path, real: str, per_class: int, seed: int, *, quality: Quality = "good", digest: str | None = None
) -> str:
    """A synthetic table of one plan made from `real`.

    "good": new pictures of the truth. "bad": pictures of the other class. "copies": the training pictures again.
    """
    plan = SynthesisPlan(
        recipe="planted",
        fingerprint="f",
        weights={"unet": quality},
        real_digest=digest or real_digest(open_table(real)),
        seed=seed,
        labels=CLASSES,
    )
    train = real_rows(real, columns=["label", "image", "mask"]).to_pylist()
    rng, rows = np.random.default_rng(seed), []
    for index in range(2 * per_class):
        request = plan.request_at(index)
        shown = 1 - request.label_index if quality == "bad" else request.label_index
        image, mask = picture(shown, rng)
        if quality == "copies":
            of_class = [row for row in train if row["label"] == request.label_index]
            row = of_class[index // 2 % len(of_class)]
            image, mask = decode_png(row["image"]), decode_png(row["mask"])
        rows.append(
            SyntheticSample(
                request_id=request.request_id, plan_id=plan.plan_id, request_index=index, attempt=0,
                recipe="planted", fingerprint="f", weights={"unet": quality}, seed=seed,
                label=request.label_index, label_name=request.label, prompt="", requested_mask=None,
                mask=encode_png(mask), image=encode_png(image), height=SIZE, width=SIZE, licence="none",
                num_inference_steps=1, guidance_scale=1.0, batch_size=1, embedding=(1.0, 0.0),
                scores={"contrast": float(index)}, code_version="0",
                stream_reject_reason="blank_image" if index % 10 == 9 else None,
            )
        )  # fmt: skip
    schema = synthetic_schema(2)
    record = {"recipe": "planted", "seed": seed, "real_digest": plan.real_digest, "fingerprint": "f",
              "weights": {"unet": quality}, "real": real}  # fmt: skip
    metadata = {"class_names": json.dumps(CLASSES), f"plan.{plan.plan_id}": json.dumps(record)}
    write_table(str(path), table_of(rows, schema), schema, metadata=metadata)
    return str(path)
