"""Paint the lesions of the training images over, so that they can serve as backgrounds without a lesion.

    factory train --recipe meddiff_ft --real real.lance --out runs/healer --objectives.0.region background
    factory heal --recipe meddiff_ft --generator runs/healer --real real.lance --out healed.lance
    factory synthesize --recipe meddiff_ft … backgrounds:healed-lesions --backgrounds.table healed.lance

The generator must have learned what lies outside the masks (MaskedDenoising, region background): one that learned
lesions would paint another lesion. Running the same command again after an interruption heals what is missing.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tyro

from factory.imaging import TrainingRow, encode_png
from factory.recipes import Recipe
from jobs.recipe_args import parse_args, parse_recipe

_FIRST_WRITE = 32
_TRAIN = "`factory train --recipe {recipe} --real REAL --out RUN --objectives.0.region background` makes one"

HEALED_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False, metadata={"description": "of the real image"}),
        pa.field("group_id", pa.string(), nullable=False, metadata={"description": "of the real image"}),
        pa.field("licence", pa.string(), nullable=False, metadata={"description": "of the real image"}),
        pa.field("label_name", pa.string(), nullable=False, metadata={"description": "class it had"}),
        pa.field("image", pa.binary(), nullable=False, metadata={"description": "PNG, uint8 (R, R[, 3])"}),
        pa.field(
            "healed_mask",
            pa.binary(),
            nullable=False,
            metadata={"description": "PNG, uint8 (R, R); 1 where pixels were painted"},
        ),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `factory heal`; any further `--field.of.recipe value` overrides the recipe."""

    recipe: str
    """Built-in recipe or module:function; one whose guidances hold MaskedBlend."""
    generator: str
    """Folder that `factory train` wrote, trained with objectives.MaskedDenoising.region background."""
    real: str
    """Real table whose training images are healed."""
    out: str
    """Table of healed images to write or complete."""
    dilation: float = 0.02
    """Width around the mask that is painted too, as a fraction of the image side: the rim of a lesion lies there."""
    feather: float = 0.01
    """Width of the seam, as a fraction of the image side."""
    seed: int = 0
    """Another seed paints other tissue."""
    batch_size: int | None = None
    """Images per batch; 16 on a CPU, 32 on a GPU."""
    device: str = "auto"
    """cpu, cuda or auto."""
    dtype: str = "auto"
    """float32, bfloat16 or auto (bfloat16 on a GPU)."""
    overwrite: bool = False
    """Discard the table that --out holds."""
    overrides: tyro.conf.Suppress[tuple[str, ...]] = ()


@dataclass(frozen=True, kw_only=True)
class HealSummary:
    """What a run of the job did: rows there before, healed now, and why others could not be."""

    out: str
    before: int
    healed: int
    failed: dict[str, str]


def run(args: Args) -> HealSummary:
    """Heal the training images with a lesion that `args.out` lacks.

    Raises:
        ValueError, FileNotFoundError: bad input, before any compute.
    """
    from factory.imaging import decode_rows
    from factory.storage import open_table, real_rows

    if not 0 <= args.dilation <= 0.2 or not 0 <= args.feather <= 0.2:
        raise ValueError(
            f"--dilation {args.dilation}, --feather {args.feather}: want 0 … .2 of the image side"
        )
    recipe = parse_recipe(args.recipe, args.overrides)
    metadata = _identity(args, recipe)
    table = real_rows(args.real, splits=("train",))
    licences = dict(zip(table["image_id"].to_pylist(), table["licence"].to_pylist()))
    rows = decode_rows(table.sort_by("image_id"), recipe.generator.resolution)
    lesions = [row for row in rows if row.mask is not None and row.mask.any()]
    if not lesions:
        raise ValueError(
            f"--real {args.real}: no training image has a lesion in its mask; there is nothing to heal"
        )
    existing = _existing(args, metadata)
    present = set() if existing is None else set(existing["image_id"].to_pylist())
    todo = [row for row in lesions if row.image_id not in present]
    print(
        f"heal: {len(todo)} of {len(lesions)} training images with a lesion, {len(present)} are there already"
    )
    healed, failed = _fill(args, recipe, rows, todo, licences, existing, metadata) if todo else (0, {})
    if failed and not healed and not present:
        raise ValueError(f"no image could be healed; the first error: {next(iter(failed.values()))}")
    assert open_table(args.out).count() == len(present) + healed
    return HealSummary(out=args.out, before=len(present), healed=healed, failed=failed)


def _fill(
    args: Args,
    recipe: Recipe,
    rows: Sequence[TrainingRow],
    todo: Sequence[TrainingRow],
    licences: Mapping[str, str],
    existing: pa.Table | None,
    metadata: dict[str, str],
) -> tuple[int, dict[str, str]]:
    """Heal `todo` into the table: how many were, and the errors of the others by image_id."""
    from jobs.progress import progress_bar

    failed: dict[str, str] = {}
    pending: list[dict[str, Any]] = []
    healed = 0
    with progress_bar("heal", len(todo)) as advance:
        for row, painted, image, error in _heal(args, recipe, rows, todo, metadata["heal"]):
            advance(1)
            if image is None:
                failed[row.image_id] = error
                continue
            pending.append(_table_row(row, licences[row.image_id], painted, image))
            healed += 1
            # Each write at least doubles the table, so no image is written more than about twice.
            if len(pending) >= max(_FIRST_WRITE, 0 if existing is None else len(existing)):
                existing, pending = _write(args.out, existing, pending, metadata), []
    if pending:
        _write(args.out, existing, pending, metadata)
    return healed, failed


def _identity(args: Args, recipe: Recipe) -> dict[str, str]:
    """Metadata of the table: what decides its pixels. Checks the generator on the way."""
    from factory.diffusion.masked_blend import MaskedBlend
    from factory.generators.checkpoints import check_recipe, read_manifest
    from schemas.identity import canonical, fingerprint

    folder = Path(args.generator)
    check_recipe(folder, recipe.name)
    objectives: list[dict[str, Any]] = read_manifest(folder)["recipe"].get("objectives", [])
    regions = [item.get("region") for item in objectives if item.get("type") == "MaskedDenoising"]
    if "background" not in regions:
        raise ValueError(
            f"--generator {folder}: it was not trained with objectives.MaskedDenoising.region background, so it would "
            f"paint lesions; {_TRAIN.format(recipe=recipe.name)}"
        )
    if not any(isinstance(item, MaskedBlend) for item in recipe.guidances):
        raise ValueError(
            f"--recipe {recipe.name}: its guidances hold no MaskedBlend, which keeps the image around the lesion"
        )
    parts = {
        "recipe": canonical((recipe.generator, recipe.prompts, recipe.sampling, recipe.guidances)),
        "weights": recipe.generator.weights(folder),
        "dilation": args.dilation,
        "feather": args.feather,
        "seed": args.seed,
    }
    return {"heal": fingerprint(parts), "heal_settings": json.dumps(parts, sort_keys=True)}


def _existing(args: Args, metadata: dict[str, str]) -> pa.Table | None:
    """Rows of an earlier run of the same command.

    Raises:
        ValueError: the table was made by another one.
    """
    from factory.storage import open_table

    try:
        table = open_table(args.out)
    except FileNotFoundError:
        return None
    if args.overwrite:
        return None
    if table.metadata.get("heal") != metadata["heal"]:
        raise ValueError(
            f"--out {args.out}: made with another generator, recipe or settings; choose another path or --overwrite"
        )
    return table.read()


def _heal(
    args: Args, recipe: Recipe, rows: Sequence[TrainingRow], todo: Sequence[TrainingRow], identity: str
) -> Iterator[tuple[TrainingRow, np.ndarray, np.ndarray | None, str]]:
    """Row, painted region, healed image or None, error."""
    import torch

    from factory.synthesis.synthesizer import PreparedRequest, Synthesizer
    from jobs.assembly import in_colour

    device = args.device if args.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.startswith("cuda")
    batch_size = args.batch_size or (32 if on_gpu else 16)
    synthesizer = Synthesizer(
        recipe.generator,
        Path(args.generator),
        recipe.sampling,
        recipe.guidances,
        None,
        colour=in_colour(rows),
        feather=args.feather,
        batch_size=batch_size,
        device=device,
        dtype=args.dtype if args.dtype != "auto" else ("bfloat16" if on_gpu else "float32"),
    )
    prompts = recipe.prompts.fit(rows)
    for start in range(0, len(todo), batch_size):
        batch = todo[start : start + batch_size]
        painted = [dilated(row.mask, args.dilation) for row in batch if row.mask is not None]
        requests = [
            PreparedRequest(
                request=_request(row, identity),
                requested_mask=mask,
                prompt=prompts.describe(row),
                background=row.image,
            )
            for row, mask in zip(batch, painted)
        ]
        for row, mask, made in zip(batch, painted, synthesizer.synthesize(requests)):
            yield row, mask, made.image, made.error or ""


def dilated(mask: np.ndarray, width: float) -> np.ndarray:
    """uint8 (S, S): 1 within `width` (fraction of the side) of the lesion."""
    from scipy import ndimage

    distance = ndimage.distance_transform_edt(mask == 0)
    return (distance <= width * mask.shape[0]).astype(np.uint8)


def _request(row: TrainingRow, identity: str) -> Any:
    from schemas.identity import hash_parts
    from schemas.request import SynthesisRequest

    return SynthesisRequest(
        request_id=hash_parts("heal", identity, row.image_id),
        plan_id=identity,
        request_index=0,
        label=row.label_name,
        label_index=row.label,
        ordinal=0,
    )


def _table_row(row: TrainingRow, licence: str, painted: np.ndarray, image: np.ndarray) -> dict[str, Any]:
    return {
        "image_id": row.image_id,
        "group_id": row.group_id,
        "licence": licence,
        "label_name": row.label_name,
        "image": encode_png(image),
        "healed_mask": encode_png(painted),
    }


def _write(
    out: str, existing: pa.Table | None, rows: list[dict[str, Any]], metadata: dict[str, str]
) -> pa.Table:
    from factory.storage import write_table

    new = pa.Table.from_pylist(rows, schema=HEALED_SCHEMA)
    if existing is not None:
        new = pa.concat_tables([existing.select(HEALED_SCHEMA.names).cast(HEALED_SCHEMA), new])
    write_table(out, new, HEALED_SCHEMA, metadata=metadata, overwrite=True)
    return new


def command(argv: Sequence[str]) -> int:
    """`factory heal`; exit status 1 where some images could not be healed."""
    from factory.tracking import track

    args = parse_args(Args, argv, prog="factory heal", description=__doc__ or "")
    with track("heal", execution_parameters=dataclasses.asdict(args), inputs={"real": args.real}) as tracked:
        summary = run(args)
        tracked.metrics({"healed": float(summary.healed), "failed": float(len(summary.failed))})
    for image_id, error in list(summary.failed.items())[:5]:
        print(f"not healed: {image_id}: {error}")
    print(
        f"wrote {summary.out}: {summary.before + summary.healed} healed images, {len(summary.failed)} failed; "
        f"next: factory synthesize --recipe {args.recipe} … backgrounds:healed-lesions --backgrounds.table "
        f"{summary.out}"
    )
    return 1 if summary.failed else 0
