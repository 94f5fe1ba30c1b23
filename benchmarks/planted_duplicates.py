"""Planted near-duplicates found again: recall and precision per kind of change, on phantom and on BUSI images.

    python benchmarks/planted_duplicates.py
    python benchmarks/planted_duplicates.py --busi ../shared/data/Dataset_BUSI_with_GT
    python benchmarks/planted_duplicates.py --real real.lance --mirror

Half of the images stand for real training images: thresholds are calibrated on them as `factory curate` does. Of the
others some are planted again with one change each (brightness, JPEG, shift, crop, speckle, blur; mirrored if asked):

- by embedding, as duplicates among synthetic images: recall is the share of planted rows linked to their source,
  precision the share of all links that join a planted row and its source;
- by registered crops, as copies of training images: recall is the share of planted copies of training images that are
  called copies, precision that share over itself and the false alarms among as many untouched images.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import save
from factory.curation.dedup import linked_pairs, real_similarity_quantile
from factory.curation.memorisation import CopyTest
from factory.curation.planted import PLANTED, planted_copy
from factory.embedding import ImageEmbedder, LoadedEmbedder
from factory.imaging import as_grey, decode_png, letterbox
from schemas.identity import random_generator

SIDE = 128


@dataclass(frozen=True, kw_only=True, eq=False)
class Images:
    """uint8 (SIDE, SIDE) grey, masks or None, and groups (patient, or the image itself)."""

    images: Sequence[np.ndarray]
    masks: Sequence[np.ndarray | None]
    groups: Sequence[str]


def phantom_images(count: int) -> Images:
    """Phantoms, each a patient of its own."""
    from factory.datasets.phantom import PhantomConfig, phantom_sample

    samples = [phantom_sample(PhantomConfig(size=SIDE), 11, index) for index in range(count)]
    return Images(
        images=[as_grey(s.image) for s in samples],
        masks=[s.mask for s in samples],
        groups=[f"g{k}" for k in range(count)],
    )


def busi_images(folder: Path, count: int, embedder: LoadedEmbedder) -> Images:
    """Evenly spread lesion images of BUSI, letterboxed, one of each near-duplicate group that `prepare` finds.

    BUSI gives no patients and repeats images: unless its own twins are grouped, they are the calibration's null.
    """
    from PIL import Image

    from factory.datasets.near_duplicates import NearDuplicates

    paths = sorted(p for label in ("benign", "malignant") for p in (folder / label).glob("*.png"))
    paths = [p for p in paths if "_mask" not in p.name]
    chosen = [paths[k] for k in np.unique(np.linspace(0, len(paths) - 1, count).astype(int))]
    whole = [np.asarray(Image.open(p).convert("L")) for p in chosen]
    names = [re.fullmatch(r"(.*?) ?\((\d+)\)", p.stem) for p in chosen]
    sequences = [None if name is None else (name[1], int(name[2])) for name in names]
    group = NearDuplicates().find(whole, embedder.embed(whole), sequences=sequences).group
    kept = np.unique(group, return_index=True)[1].tolist()
    chosen = [chosen[k] for k in kept]
    images = [letterbox(whole[k], SIDE) for k in kept]
    masks = [np.asarray(Image.open(p.with_name(p.stem + "_mask.png")).convert("L")) > 0 for p in chosen]
    return Images(
        images=images,
        masks=[letterbox(mask.astype(np.uint8), SIDE, is_mask=True) for mask in masks],
        groups=[p.stem for p in chosen],
    )


def table_images(uri: str, count: int) -> Images:
    """Training rows of a prepared table."""
    from factory.storage import real_rows

    rows = real_rows(uri, columns=["image", "mask", "group_id"]).slice(0, count).to_pylist()
    masks = [None if row["mask"] is None else decode_png(row["mask"]) for row in rows]
    return Images(
        images=[letterbox(as_grey(decode_png(row["image"])), SIDE) for row in rows],
        masks=[None if mask is None else letterbox(mask, SIDE, is_mask=True) for mask in masks],
        groups=[row["group_id"] for row in rows],
    )


def of_embedding(
    data: Images,
    vectors: np.ndarray,
    embedder: LoadedEmbedder,
    kinds: Sequence[str],
    quantiles: Sequence[float],
) -> dict[str, Any]:
    """Links at the threshold of each quantile, with every kind planted once into the second half of the images."""
    half = len(data.images) // 2
    sources = list(range(half, len(data.images)))
    found: dict[str, Any] = {}
    planted = {
        kind: embedder.embed(
            [
                planted_copy(kind, data.images[k], None, random_generator(f"planted/{k}", kind))[0]
                for k in sources
            ]
        )
        for kind in kinds
    }
    for quantile in quantiles:
        threshold = real_similarity_quantile(vectors[:half], data.groups[:half], quantile, 1)
        by_kind = {}
        for kind in kinds:
            rows = np.concatenate([vectors[sources], planted[kind]])
            pairs = [np.stack(pair, 1) for pair in linked_pairs(rows, threshold, 1)]
            links = np.concatenate([np.empty((0, 2), np.int64), *pairs])
            right = int((links[:, 1] - links[:, 0] == len(sources)).sum())
            by_kind[kind] = {
                "recall": right / len(sources),
                "precision": right / len(links) if len(links) else None,
                "median_cosine": float(np.median((vectors[sources] * planted[kind]).sum(1))),
            }
        found[f"quantile {quantile}"] = {"threshold": threshold, "kinds": by_kind}
    return found


def of_copy_test(
    data: Images, vectors: np.ndarray, embedder: LoadedEmbedder, kinds: Sequence[str]
) -> dict[str, Any]:
    """The registered-crop test fitted on the first half; copies of these planted, the second half as what is none."""
    half = len(data.images) // 2
    source = CopyTest(side=96)
    frames = [source.frame(image, mask) for image, mask in zip(data.images[:half], data.masks[:half])]
    test = source.fit(frames, vectors[:half], data.groups[:half])
    others = range(half, len(data.images))
    alarms = float(
        np.mean([test.match(source.frame(data.images[k], data.masks[k]), vectors[k]).is_copy for k in others])
    )
    by_kind = {}
    for kind in kinds:
        copies = [
            planted_copy(kind, data.images[k], data.masks[k], random_generator(f"planted/{k}", kind))
            for k in range(half)
        ]
        embedded = embedder.embed([copy for copy, _ in copies])
        matches = [test.match(source.frame(*copy), vector) for copy, vector in zip(copies, embedded)]
        recall = float(np.mean([match.is_copy for match in matches]))
        by_kind[kind] = {
            "recall": recall,
            "precision": recall / (recall + alarms) if recall + alarms else None,
            "attributed": float(np.mean([match.reference == k for k, match in enumerate(matches)])),
        }
    thresholds: Mapping[Any, float] = test.thresholds
    return {"thresholds": dict(thresholds), "false_alarm": alarms, "kinds": by_kind}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=120, help="images of each source")
    parser.add_argument("--busi", type=Path, help="folder of the BUSI images")
    parser.add_argument("--real", help="a prepared table instead of phantoms")
    parser.add_argument("--mirror", action="store_true", help="plant mirrored images too")
    parser.add_argument("--embedder", default="tiny")
    parser.add_argument("--weights", help="safetensors file of a timm embedder")
    args = parser.parse_args()
    kinds = [kind for kind in PLANTED if args.mirror or kind != "mirror"]
    embedder = ImageEmbedder(name=args.embedder, weights=args.weights).load(num_threads=1)
    sets = (
        {"phantom": phantom_images(args.count)}
        if args.real is None
        else {"table": table_images(args.real, args.count)}
    )
    if args.busi is not None:
        sets["busi"] = busi_images(args.busi, args.count, embedder)
    results: dict[str, Any] = {}
    for name, data in sets.items():
        vectors = embedder.embed(data.images)
        results[name] = {
            "images": len(data.images),
            "embedding": of_embedding(data, vectors, embedder, kinds, (0.99, 0.999)),
            "registered_crops": of_copy_test(data, vectors, embedder, kinds),
        }
        print(name, json.dumps(results[name], indent=1), flush=True)
    settings = {
        "width": args.embedder.split(":")[-1].split("?")[0],
        "count": args.count,
        "side": SIDE,
        "embedder": args.embedder,
    }
    print(save("planted_duplicates", settings, results, "cpu"))


if __name__ == "__main__":
    main()
