"""Make one row of a synthetic table again from its recorded provenance, and compare.

    factory reproduce synthetic.lance 0f3a… --sheet again.png

The requested mask and the prompt must come back bit-equal. The image must agree within the tolerance of
batched kernels (the last bits of a matrix product depend on the batch), the mask to an overlap of 0.99.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from factory.recipes import Recipe

MASK_IOU = 0.99


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `factory reproduce`."""

    table: Positional[str]
    """Synthetic table."""
    request_id: Positional[str]
    """The row, by its request_id or a unique beginning of it."""
    generator: str | None = None
    """Generator folder, where the recorded path does not hold on this machine."""
    real: str | None = None
    """Real table, where the recorded path does not hold on this machine."""
    recipe: str | None = None
    """The row's recipe, repeated, where it is a module:function: a table may not choose which code runs."""
    sheet: str | None = None
    """Write the stored and the new image side by side."""
    device: str = "cpu"
    """cpu or cuda."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Stored row against the row made again."""

    request_id: str
    prompt_equal: bool
    requested_mask_equal: bool
    mask_iou: float
    largest_difference: int
    mean_difference: float
    tolerance: int
    stored: np.ndarray
    again: np.ndarray

    @property
    def agrees(self) -> bool:
        """Everything within its tolerance."""
        return (
            self.prompt_equal
            and self.requested_mask_equal
            and self.mask_iou >= MASK_IOU
            and self.largest_difference <= self.tolerance
        )


def _find(table: Any, request_id: str) -> dict[str, Any]:
    if not request_id or not all(c in "0123456789abcdef" for c in request_id):
        raise ValueError(f"request_id {request_id!r}: want hexadecimal digits, at least the first few")
    columns = [
        "request_id",
        "plan_id",
        "batch_size",
        "request_index",
        "prompt",
        "requested_mask",
        "mask",
        "image",
    ]
    rows = table.read(columns=columns, filter=f"starts_with(request_id, '{request_id}')", limit=2).to_pylist()
    if not rows:
        raise ValueError(f"request_id {request_id!r} is not in {table.uri}; `factory query` lists rows")
    if len(rows) > 1:
        raise ValueError(f"request_id {request_id!r} is the beginning of several rows; give more digits")
    return rows[0]


def recorded_recipe(args: Args, record: Mapping[str, Any]) -> Recipe:
    """The recipe that the table's plan names.

    Raises:
        ValueError: it is a module:function that `--recipe` does not repeat: the table may come from a stranger.
    """
    from jobs.recipe_args import parse_recipe

    name = record["recipe"]
    if ":" in name and args.recipe != name:
        raise ValueError(
            f"{args.table} names recipe {name!r}, which is code of its own; if you trust it, add --recipe {name}"
        )
    return parse_recipe(name, record["overrides"])


def run(args: Args) -> Comparison:
    """Make the row again.

    Raises:
        ValueError: unknown row, or recipe, weights or real rows are not those of the row's plan.
        FileNotFoundError: table, generator or real table is not there.
    """
    from factory.imaging import decode_png, decode_rows
    from factory.storage import open_table, real_digest, real_rows
    from factory.synthesis.stages import PIXEL_SCHEMA, SynthesisStage
    from factory.synthesis.synthesizer import IMAGE_TOLERANCE
    from jobs.assembly import all_weights, in_colour, make_request_stage, synthesizer_settings
    from schemas.request import SynthesisPlan

    table = open_table(args.table)
    row = _find(table, args.request_id)
    record = json.loads(table.metadata[f"plan.{row['plan_id']}"])
    recipe = recorded_recipe(args, record)
    if recipe.fingerprint != record["fingerprint"]:
        raise ValueError(
            f"recipe {record['recipe']!r} has fingerprint {recipe.fingerprint} in this code and "
            f"{record['fingerprint']} in the table; check out {record['code_version']}"
        )
    generator = Path(args.generator or record["generator"])
    adapters = tuple(Path(a) for a in record["adapters"])
    weights = all_weights(recipe, generator, adapters)
    changed = [name for name, digest in record["weights"].items() if weights.get(name) != digest]
    if changed:
        raise ValueError(
            f"--generator {generator}: weights {', '.join(changed)} are not those the row was made with"
        )
    real_uri = args.real or record["real"]
    real = open_table(real_uri)
    if real_digest(real) != record["real_digest"]:
        raise ValueError(f"--real {real_uri}: its training rows are not those the row was made with")
    plan = SynthesisPlan(
        recipe=recipe.name,
        fingerprint=recipe.fingerprint,
        weights=record["weights"],
        real_digest=record["real_digest"],
        seed=record["seed"],
        labels=tuple(record["labels"]),
    )
    rows = decode_rows(real_rows(real_uri, splits=("train",)), recipe.generator.resolution)
    requests = make_request_stage(recipe, plan, rows)
    settings = synthesizer_settings(
        recipe, generator, adapters, colour=in_colour(rows), batch_size=1, device=args.device
    )
    request = requests([row["request_index"]])
    made = SynthesisStage(settings, plan)(request).select(PIXEL_SCHEMA.names).to_pylist()[0]
    if made["error"]:
        raise ValueError(f"request {row['request_id']} failed this time: {made['error']}")
    stored = decode_png(row["image"])
    again = np.frombuffer(made["pixels"], np.uint8).reshape(stored.shape)
    iou = _mask_iou(row["mask"], made["mask_pixels"])
    difference = np.abs(stored.astype(int) - again.astype(int))
    return Comparison(
        request_id=row["request_id"],
        prompt_equal=made["prompt"] == row["prompt"],
        requested_mask_equal=_same_png(made["requested_mask"], row["requested_mask"]),
        mask_iou=iou,
        largest_difference=int(difference.max()),
        mean_difference=float(difference.mean()),
        tolerance=IMAGE_TOLERANCE,
        stored=stored,
        again=again,
    )


def _same_png(one: bytes | None, two: bytes | None) -> bool:
    from factory.imaging import decode_png

    if one is None or two is None:
        return one is two
    return bool(np.array_equal(decode_png(one), decode_png(two)))


def _mask_iou(stored: bytes | None, again: bytes | None) -> float:
    """Overlap of a stored mask (PNG) and raw bytes of the one made again; 1 where both are absent or empty."""
    from factory.imaging import decode_png

    if stored is None or again is None:
        return float(stored is again)
    mask = decode_png(stored) > 0
    mask_again = np.frombuffer(again, np.uint8).reshape(mask.shape) > 0
    union = np.count_nonzero(mask | mask_again)
    return np.count_nonzero(mask & mask_again) / union if union else 1.0


def command(argv: Sequence[str]) -> int:
    """`factory reproduce`; exit status 1 where the row does not come back."""
    import tyro

    args = tyro.cli(Args, args=list(argv), prog="factory reproduce", description=__doc__)
    from factory.tracking import track

    with track(
        "reproduce", execution_parameters=dataclasses.asdict(args), inputs={"synthetic": args.table}
    ) as tracked:
        result = run(args)
        tracked.set({"request_id": result.request_id, "reproduced": str(result.agrees)})
        tracked.metrics({"largest_difference": result.largest_difference, "mask_iou": result.mask_iou})
    print(f"request {result.request_id}")
    print(f"prompt          {'equal' if result.prompt_equal else 'DIFFERS'}")
    print(f"requested mask  {'bit-equal' if result.requested_mask_equal else 'DIFFERS'}")
    print(f"mask            IoU {result.mask_iou:.4f} (at least {MASK_IOU})")
    print(
        f"image           largest difference {result.largest_difference} of 255 (tolerance {result.tolerance}), "
        f"mean {result.mean_difference:.4f}"
    )
    if args.sheet:
        from factory.report import contact_sheet

        sheet = contact_sheet(
            [result.stored, result.again], captions=["stored", "made again"], columns=2, cell=256
        )
        sheet.save(args.sheet)
        print(f"wrote {args.sheet}")
    print("reproduced" if result.agrees else "NOT reproduced")
    return 0 if result.agrees else 1
