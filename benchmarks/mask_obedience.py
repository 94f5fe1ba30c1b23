"""Is the mask obeyed? Where an image changes when its mask is taken away, against the mask that was asked for.

    python benchmarks/mask_obedience.py synthetic.lance --num-requests 64

Each request is made twice from the same noise and prompt: with its mask, and with an empty one. The change is
the smoothed absolute difference; Otsu's threshold makes it a region. Reported: mean IoU and Dice of that region
with the requested mask, the share of the change that falls inside the mask over the mask's share of the frame
(1 = no better than chance), and, as a control, the same with the masks of other requests of the class.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
from measure import save


def overlap(change: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """IoU and Dice of the changed region with the mask, and the concentration of the change in it."""
    from skimage.filters import threshold_otsu

    region, inside = change > threshold_otsu(change), mask > 0
    both = np.count_nonzero(region & inside)
    return {
        "iou": both / np.count_nonzero(region | inside),
        "dice": 2 * both / (np.count_nonzero(region) + np.count_nonzero(inside)),
        "concentration": float(change[inside].sum() / change.sum() / inside.mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table")
    parser.add_argument("--num-requests", type=int, default=64)
    parser.add_argument("--smoothing", type=float, default=3.0, help="sigma of the smoothed difference, px")
    parser.add_argument("--name", default="phantom", help="dataset, for the name of the result")
    args = parser.parse_args()

    from scipy.ndimage import gaussian_filter

    from factory.imaging import decode_png
    from factory.storage import open_table
    from factory.synthesis.synthesizer import PreparedRequest, Synthesizer
    from jobs.recipe_args import parse_recipe
    from schemas.request import SynthesisPlan

    table = open_table(args.table)
    plans = {key[5:]: json.loads(value) for key, value in table.metadata.items() if key.startswith("plan.")}
    plan_id, record = next(iter(plans.items()))
    recipe = parse_recipe(record["recipe"], record["overrides"])
    plan = SynthesisPlan(
        recipe=recipe.name,
        fingerprint=record["fingerprint"],
        weights=record["weights"],
        real_digest=record["real_digest"],
        seed=record["seed"],
        labels=tuple(record["labels"]),
    )
    assert plan.plan_id == plan_id
    columns = ["request_index", "requested_mask", "prompt", "label_name"]
    rows = table.read(columns=columns, filter=f"plan_id = '{plan_id}'").to_pylist()
    rows = sorted(rows, key=lambda row: row["request_index"])
    rows = [row for row in rows if decode_png(row["requested_mask"]).any()][: args.num_requests]
    synthesizer = Synthesizer(
        recipe.generator,
        Path(record["generator"]),
        recipe.sampling,
        (),
        recipe.annotator,
        batch_size=16,
        adapters=tuple(Path(adapter) for adapter in record["adapters"]),
    )
    with_mask = [
        PreparedRequest(
            request=plan.request_at(row["request_index"]),
            requested_mask=decode_png(row["requested_mask"]),
            prompt=row["prompt"],
        )
        for row in rows
    ]
    without = [
        dataclasses.replace(item, requested_mask=np.zeros_like(item.requested_mask)) for item in with_mask
    ]
    pairs = list(zip(synthesizer.synthesize(with_mask), synthesizer.synthesize(without)))
    changes = [
        gaussian_filter(np.abs(a.image.astype(float) - b.image.astype(float)), args.smoothing)
        for a, b in pairs
    ]
    masks = [item.requested_mask for item in with_mask]
    by_label: dict[str, list[int]] = {}
    for position, row in enumerate(rows):
        by_label.setdefault(row["label_name"], []).append(position)
    other = {
        position: members[(place + 1) % len(members)]
        for members in by_label.values()
        for place, position in enumerate(members)
    }
    asked = [overlap(change, mask) for change, mask in zip(changes, masks)]
    control = [overlap(change, masks[other[position]]) for position, change in enumerate(changes)]
    results = {
        "num_requests": len(rows),
        "asked": {name: float(np.mean([item[name] for item in asked])) for name in asked[0]},
        "control_other_mask": {name: float(np.mean([item[name] for item in control])) for name in control[0]},
        "share_with_iou_above_control": float(np.mean([a["iou"] > c["iou"] for a, c in zip(asked, control)])),
    }
    path = save(
        "mask_obedience",
        {"width": args.name, "recipe": recipe.name, "smoothing_px": args.smoothing},
        results,
        "cpu",
    )
    print(json.dumps(results, indent=2))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
