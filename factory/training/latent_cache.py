"""Latents and prompt embeddings, computed once and kept in tables beside the real one.

    REAL.cache/latents-2-<VAE digest>-<resolution>.lance    key, flipped, mean, logvar
    REAL.cache/prompts-<text encoder digest>.lance          prompt, embedding

The keys name what was computed, so a table never goes stale: rows are found by image_id (a hash of the pixels;
for the image without what lies under its mask, followed by a hash of that mask) or by the prompt's text, and
what is missing is added.
"""

import contextlib
import fcntl
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from factory.generators.checkpoints import digest_part
from factory.imaging import TrainingRow, as_rgb
from factory.training.examples import Latents
from schemas.identity import hash_parts

if TYPE_CHECKING:
    from factory.generators.latent_diffusion import LatentDiffusion
    from factory.generators.loaded import LoadedGenerator
    from factory.training.task import TrainingTask

NULL_PROMPT = ""
_LAYOUT = 2  # of the columns: a cache of an older layout is not read
_FIRST_FLUSH = 256

Encode = Callable[[np.ndarray, np.ndarray | None], tuple[np.ndarray, np.ndarray]]
"""Images uint8 (B, R, R, 3), label maps (B, R, R) to hide or None → mean and logvar, float16 (B, C, h, w)."""


class Variant(NamedTuple):
    """Which form of an image is encoded.

    Attributes:
        flipped: mirrored left to right.
        hidden: without what lies under its mask, as inpainting takes it.
    """

    flipped: bool = False
    hidden: bool = False


def variants_of(task: "TrainingTask", flips: Sequence[bool]) -> tuple[Variant, ...]:
    """What of each row is encoded for a task."""
    hidden = (False, True) if task.generator.conditioning.uses_inpaint else (False,)
    return tuple(Variant(flip, hide) for hide in hidden for flip in flips)


def cache_key(row: TrainingRow, hidden: bool) -> str:
    """Under which key the latents of a row lie: its image_id, and where the mask matters a hash of that."""
    if not hidden:
        return row.image_id
    assert row.mask is not None
    return f"{row.image_id}/{hash_parts(row.mask.tobytes().hex())[:16]}"


def latents_uri(real: str, generator: "LatentDiffusion") -> str:
    """Where the latents of the rows of `real` lie for this generator's VAE and resolution."""
    from factory.storage import cache_folder

    digest = digest_part(generator.vae_folder(), "vae")
    return str(cache_folder(real) / f"latents-{_LAYOUT}-{digest}-{generator.resolution}.lance")


def prompts_uri(real: str, generator: "LatentDiffusion") -> str:
    """Where the embeddings of prompts lie for this generator's text encoder and tokenizer."""
    from factory.storage import cache_folder

    base = generator.base_folder()
    added = [word for pair in generator.placeholders for word in pair]
    digest = hash_parts(digest_part(base, "text_encoder"), digest_part(base, "tokenizer"), *added)
    return str(cache_folder(real) / f"prompts-{digest}.lance")


def latents_schema(latent_shape: tuple[int, int, int]) -> pa.Schema:
    """Columns of the latent table for latents (C, h, w)."""
    values = pa.list_(pa.float16(), int(np.prod(latent_shape)))
    shape = {"shape": ",".join(str(n) for n in latent_shape)}
    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("flipped", pa.bool_(), nullable=False),
            pa.field("mean", values, nullable=False, metadata=shape),
            pa.field("logvar", values, nullable=False, metadata=shape),
        ]
    )


def encoder_of(generator: "LoadedGenerator") -> Encode:
    """The VAE of a loaded generator as a plain function."""
    import torch

    def encode(images: np.ndarray, hidden: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        mean, logvar = generator.encode_images(images, None if hidden is None else torch.from_numpy(hidden))
        return tuple(x.float().cpu().numpy().astype(np.float16) for x in (mean, logvar))  # type: ignore[return-value]

    return encode


def encode_rows(rows: Sequence[TrainingRow], encode: Encode, variant: Variant) -> pa.Table:
    """Latents of decoded rows, as rows of the latent table.

    Raises:
        ValueError: a latent is not finite in float16; names the image.
    """
    side = -1 if variant.flipped else 1
    images = np.stack([as_rgb(row.image)[:, ::side] for row in rows])
    masks = None
    if variant.hidden:
        masks = np.stack([row.mask[:, ::side] for row in rows if row.mask is not None])
    mean, logvar = encode(images, masks)
    finite = np.isfinite(mean).all((1, 2, 3)) & np.isfinite(logvar).all((1, 2, 3))
    if not finite.all():
        raise ValueError(f"latents of image {rows[int(np.argmin(finite))].image_id} are not finite")
    schema = latents_schema(mean.shape[1:])
    keys = [cache_key(row, variant.hidden) for row in rows]
    columns = [pa.array(keys), pa.array([variant.flipped] * len(rows))]
    for name, values in (("mean", mean), ("logvar", logvar)):
        flat = pa.array(values.reshape(-1))
        columns.append(pa.FixedSizeListArray.from_arrays(flat, type=schema.field(name).type))
    return pa.Table.from_arrays(columns, schema=schema)


def missing_latents(
    uri: str, rows: Sequence[TrainingRow], variants: Sequence[Variant]
) -> list[tuple[TrainingRow, Variant]]:
    """Rows and variants that the table lacks, in the order given."""
    from factory.storage import open_table

    try:
        table = open_table(uri).read(["key", "flipped"])
    except FileNotFoundError:
        present = set()
    else:
        present = set(zip(table["key"].to_pylist(), table["flipped"].to_pylist()))
    found: dict[tuple[str, bool], tuple[TrainingRow, Variant]] = {}
    for variant in variants:
        for row in rows:
            key = (cache_key(row, variant.hidden), variant.flipped)
            if key not in present:
                found.setdefault(key, (row, variant))
    return list(found.values())


def fill_latents(
    uri: str,
    rows: Sequence[TrainingRow],
    encode: Encode,
    *,
    variants: Sequence[Variant] = (Variant(),),
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Encode what the table at `uri` lacks and add it; returns how many latents were computed.

    `progress` is called with (latents done, latents to compute). Work is kept as it goes: each write at least
    doubles the table or adds 256 rows, so a killed fill loses at most half of its work and nothing is written
    more than about twice.
    """
    with locked(uri):
        return add_latents(uri, _encoded(missing_latents(uri, rows, variants), encode, batch_size, progress))


def _encoded(
    missing: Sequence[tuple[TrainingRow, Variant]],
    encode: Encode,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> Iterator[pa.Table]:
    done = 0
    for variant in dict.fromkeys(v for _, v in missing):
        rows = [row for row, v in missing if v == variant]
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            yield encode_rows(batch, encode, variant)
            done += len(batch)
            if progress is not None:
                progress(done, len(missing))


def add_latents(uri: str, tables: Iterator[pa.Table]) -> int:
    """Add rows to the latent table, which is made where absent; returns their number. One writer at a time."""
    pending: list[pa.Table] = []
    added = stored = 0
    for table in tables:
        pending.append(table)
        waiting = sum(len(t) for t in pending)
        if waiting >= max(_FIRST_FLUSH, stored):
            stored = _append(uri, pa.concat_tables(pending))
            added, pending = added + waiting, []
    if pending:
        added += sum(len(t) for t in pending)
        _append(uri, pa.concat_tables(pending))
    return added


def _append(uri: str, new: pa.Table) -> int:
    """Rewrite the table at `uri` with `new` rows behind its own; returns its new number of rows."""
    from factory.storage import open_table, write_table

    try:
        existing = open_table(uri)
    except FileNotFoundError:
        write_table(uri, new, new.schema)
        return len(new)

    def rows() -> Iterator[pa.RecordBatch]:
        yield from existing.batches()
        yield from new.to_batches()

    before = existing.count()
    write_table(uri, rows(), new.schema, overwrite=True)
    return before + len(new)


def read_latents(
    uri: str, rows: Sequence[TrainingRow], variants: Sequence[Variant] = (Variant(),)
) -> Latents:
    """Cached latents in the order of `rows`.

    Raises:
        ValueError: the table lacks some of them.
    """
    read = {
        variant: _read_side(uri, [cache_key(row, variant.hidden) for row in rows], variant.flipped)
        for variant in variants
    }
    nothing = (None, None)
    mean, logvar = read[Variant()]
    flipped_mean, flipped_logvar = read.get(Variant(flipped=True), nothing)
    return Latents(
        mean=mean,
        logvar=logvar,
        flipped_mean=flipped_mean,
        flipped_logvar=flipped_logvar,
        masked=read.get(Variant(hidden=True), nothing)[0],
        flipped_masked=read.get(Variant(flipped=True, hidden=True), nothing)[0],
    )


def _read_side(uri: str, keys: Sequence[str], flipped: bool) -> tuple[np.ndarray, np.ndarray]:
    from factory.storage import open_table

    table = open_table(uri)
    shape = tuple(int(n) for n in table.schema.field("mean").metadata[b"shape"].split(b","))
    place = {key: number for number, key in enumerate(keys)}
    out = [np.empty((len(keys), *shape), np.float16) for _ in range(2)]
    found = np.zeros(len(keys), bool)
    for batch in table.batches(filter=f"flipped = {str(flipped).lower()}"):
        chosen = [(i, place[x]) for i, x in enumerate(batch["key"].to_pylist()) if x in place]
        if not chosen:
            continue
        source, target = (np.array(numbers) for numbers in zip(*chosen))
        for values, name in zip(out, ("mean", "logvar")):
            values[target] = batch[name].flatten().to_numpy().reshape(-1, *shape)[source]
        found[target] = True
    if not found.all():
        first = keys[int(np.argmin(found))]
        raise ValueError(
            f"{uri}: lacks the latents of {int((~found).sum())} images, first {first}; run the same command "
            "again (another process may have replaced the table)"
        )
    return out[0], out[1]


def embed_prompts(
    uri: str, prompts: Sequence[str], embed: Callable[[list[str]], np.ndarray], *, batch_size: int = 32
) -> np.ndarray:
    """Embeddings of `prompts` in their order, float32 (P, L, D); those the table at `uri` lacks are added.

    Args:
        embed: prompts → float32 (n, L, D).
    """
    from factory.storage import open_table

    with locked(uri):
        try:
            table = open_table(uri)
            known = {r["prompt"] for r in table.read(["prompt"]).to_pylist()}
        except FileNotFoundError:
            known = set()
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        for start in range(0, len(missing), batch_size):
            _append(
                uri,
                _prompt_rows(missing[start : start + batch_size], embed(missing[start : start + batch_size])),
            )
        table = open_table(uri)
    shape = tuple(int(n) for n in table.schema.field("embedding").metadata[b"shape"].split(b","))
    wanted = dict.fromkeys(prompts)
    place = {prompt: number for number, prompt in enumerate(wanted)}
    out = np.empty((len(wanted), *shape), np.float32)
    for batch in table.batches():
        values = batch["embedding"].flatten().to_numpy().reshape(-1, *shape)
        for i, prompt in enumerate(batch["prompt"].to_pylist()):
            if prompt in place:
                out[place[prompt]] = values[i]
    return out[[place[prompt] for prompt in prompts]]


def _prompt_rows(prompts: Sequence[str], embeds: np.ndarray) -> pa.Table:
    shape = {"shape": ",".join(str(n) for n in embeds.shape[1:])}
    values = pa.list_(pa.float32(), int(np.prod(embeds.shape[1:])))
    schema = pa.schema(
        [
            pa.field("prompt", pa.string(), nullable=False),
            pa.field("embedding", values, nullable=False, metadata=shape),
        ]
    )
    flat = pa.array(np.ascontiguousarray(embeds, np.float32).reshape(-1))
    return pa.Table.from_arrays(
        [pa.array(prompts), pa.FixedSizeListArray.from_arrays(flat, type=values)], schema=schema
    )


def latent_kl(latents: Latents, scaling_factor: float) -> dict[str, float]:
    """KL of the VAE's posteriors from the unit Gaussian, in nats: mean per image, and per latent number.

    Paper 001, Eq. 4, with ω² the variance (the paper's text calls it the log-variance): ½ Σ (μ² + ω² - 1 - log ω²),
    on the VAE's own latents, before `scaling_factor`. The VAE is frozen, so this is a constant of the data: it is
    logged, not minimised.
    """
    mean = latents.mean.astype(np.float64) / scaling_factor
    logvar = latents.logvar.astype(np.float64) - 2 * np.log(scaling_factor)
    kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar)
    per_image = kl.sum(axis=(1, 2, 3))
    return {"latent_kl": float(per_image.mean()), "latent_kl_per_number": float(kl.mean())}


@contextlib.contextmanager
def locked(uri: str) -> Iterator[None]:
    """One process at a time fills a local cache table; object stores are not locked (the last writer wins)."""
    if "://" in uri:
        yield
        return
    path = Path(f"{uri}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
