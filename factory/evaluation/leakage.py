"""Checks that no evaluation row, and no row a generator should not have seen, is in what trains.

All of them raise before compute is spent; none repairs anything silently.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from factory.predictors.examples import Examples
from schemas.identity import hash_parts

if TYPE_CHECKING:
    from factory.datasets.near_duplicates import NearDuplicates
    from factory.storage import Table, TestAccess

Scenario = Literal["equal_budget", "release"]
_NAMED = 3


def check_disjoint(training: Examples, **held_out: Examples | None) -> None:
    """Refuse training rows that are, belong to, or show what a held-out part holds.

    Looks at ids, at groups (patients and near-duplicates; a derived row has the group of its real image), and at the
    letterboxed pixels: a synthetic image that equals an evaluation image was copied from it. Images of one grey
    value only are not compared.

    Args:
        training: all rows that train, real and synthetic.
        held_out: evaluation and early-stopping rows by name; None is passed over.

    Raises:
        ValueError: naming the part, the rows and what they share.
    """
    ids, groups = set(training.ids), set(training.groups)
    pixels: dict[str, str] | None = None
    for name, part in held_out.items():
        if part is None:
            continue
        _refuse(name, "id", [one for one in part.ids if one in ids])
        _refuse(name, "group", [one for one, group in zip(part.ids, part.groups) if group in groups])
        if part.images.shape[1:] != training.images.shape[1:]:
            continue
        pixels = _pixel_digests(training) if pixels is None else pixels
        same = [f"{one} = {pixels[d]}" for d, one in _pixel_digests(part).items() if d in pixels]
        _refuse(name, "pixels", same)


def check_parts_disjoint(parts: Mapping[str, Examples]) -> None:
    """Refuse splits or folds that share a group.

    Raises:
        ValueError: naming two parts and a group.
    """
    seen: dict[str, str] = {}
    for name, part in parts.items():
        for group in sorted(set(part.groups)):
            if group in seen:
                raise ValueError(
                    f"group {group} is in {seen[group]} and in {name}: near-duplicates or one patient on both sides; "
                    "prepare the table again"
                )
        seen |= dict.fromkeys(part.groups, name)


def _refuse(name: str, what: str, shared: Sequence[str]) -> None:
    if shared:
        told = ", ".join(shared[:_NAMED]) + (
            f" and {len(shared) - _NAMED} more" if len(shared) > _NAMED else ""
        )
        raise ValueError(
            f"leak: {len(shared)} row(s) of {name} share their {what} with the training set: {told}; nothing was trained"
        )


def _pixel_digests(examples: Examples) -> dict[str, str]:
    flat = examples.images.reshape(len(examples), -1)
    varied = flat.min(axis=1, initial=255) < flat.max(axis=1, initial=0)
    return {
        hashlib.sha256(flat[row].tobytes()).hexdigest(): examples.ids[row]
        for row in np.flatnonzero(varied).tolist()
    }


@dataclass(frozen=True, kw_only=True)
class GeneratorRecord:
    """A plan behind synthetic rows: what is known of its generator.

    Attributes:
        plan_id: of its rows.
        recipe, seed: as `factory synthesize` was asked.
        real_digest: content digest of the real rows that it was made from.
        fingerprint: of the recipe.
        weights: digests by name.
    """

    plan_id: str
    recipe: str
    seed: int
    real_digest: str
    fingerprint: str
    weights: Mapping[str, str]


def generator_records(table: "Table", plan_ids: Sequence[str]) -> list[GeneratorRecord]:
    """What the table records of these plans.

    Raises:
        ValueError: a plan without record.
    """
    records = []
    for plan_id in sorted(set(plan_ids)):
        text = table.metadata.get(f"plan.{plan_id}")
        if text is None:
            raise ValueError(
                f"{table.uri}: plan {plan_id} has no record of its real rows; write the rows again with `factory synthesize`"
            )
        found = json.loads(text)
        names = ("recipe", "seed", "real_digest", "fingerprint", "weights")
        records.append(GeneratorRecord(plan_id=plan_id, **{name: found[name] for name in names}))
    return records


def check_real_budget(
    uri: str,
    records: Sequence[GeneratorRecord],
    digest: str,
    *,
    scenario: Scenario = "equal_budget",
    what: str = "the train split",
) -> None:
    """Refuse a generator that was made from other real rows than the task model trains on (equal real-data budget).

    Args:
        uri: the synthetic table, for the message.
        records: plans of the rows used.
        digest: content digest of the real training rows.
        scenario: "release" lets a generator of other real rows pass: synthetic only against real only.

    Raises:
        ValueError: naming the plan.
    """
    for record in records:
        if record.real_digest != digest and scenario != "release":
            raise ValueError(
                f"{uri}: plan {record.plan_id} ({record.recipe}) was made from other real rows ({record.real_digest[:12]}) "
                f"than {what} ({digest[:12]}): its generator has seen real data that the other arms lack; train one on "
                "exactly these rows, or name the scenario: --scenario release"
            )


def rows_digest(examples: Examples) -> str:
    """Content digest of real rows, the same as `factory.storage.real_digest` gives for them."""
    pairs = sorted(zip(examples.ids, examples.labels.tolist(), strict=True))
    return hash_parts("real", *(part for pair in pairs for part in pair))


@dataclass(frozen=True, kw_only=True)
class SharedImage:
    """A row of one table that shows the same frame or examination as a row of another."""

    image_id: str
    other_id: str
    kind: str
    correlation: float


def images_shared_between(
    uri: str,
    splits: Sequence[str],
    other: str,
    other_splits: Sequence[str],
    *,
    search: "NearDuplicates | None" = None,
    access: "TestAccess | None" = None,
    progress: Any = lambda count: None,
) -> list[SharedImage]:
    """Near-duplicates across two tables, by the search that `factory prepare` makes within one.

    Public datasets overlap (BreastMNIST holds images of BUSI; ISIC and HAM10000 share some), so a test set from
    elsewhere is checked over the union of both tables.

    Args:
        uri, splits: rows that train or stop training.
        other, other_splits: rows that are to judge.
        access: leave to read test rows of either.
        progress: called with the number of images searched.

    Returns:
        Rows of `other` that must not judge, or must be left out of training.
    """
    from factory.datasets.near_duplicates import NearDuplicates
    from factory.embedding import EmbedderSpec
    from factory.imaging import decode_png
    from factory.storage import open_table, real_rows

    columns = ["image_id", "image", "embedding"]
    one = real_rows(uri, splits=splits, columns=columns, access=access)
    two = real_rows(other, splits=other_splits, columns=columns, access=access)
    images = [decode_png(data) for data in (*one["image"].to_pylist(), *two["image"].to_pylist())]
    specs = [EmbedderSpec.from_json(open_table(u).metadata["embedder"]) for u in (uri, other)]
    if dataclass_equal(specs[0], specs[1]):
        stored = [np.stack(t["embedding"].to_numpy(zero_copy_only=False)) for t in (one, two)]
        embeddings = np.concatenate(stored).astype(np.float32)
    else:
        embeddings = specs[0].embedder().load(num_threads=1).embed(images)
    found = (search or NearDuplicates()).find(images, embeddings, progress=progress)
    ids = [*one["image_id"].to_pylist(), *two["image_id"].to_pylist()]
    return [
        SharedImage(
            image_id=ids[pair.first], other_id=ids[pair.second], kind=pair.kind, correlation=pair.correlation
        )
        for pair in found.pairs
        if pair.first < one.num_rows <= pair.second
    ]


def dataclass_equal(one: Any, two: Any) -> bool:
    """Whether two embedder specs are the same but for where the weights lie."""
    import dataclasses

    return dataclasses.replace(one, weights=None) == dataclasses.replace(two, weights=None)
