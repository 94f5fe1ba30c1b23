"""Mask fidelity and regeneration as `factory synthesize` uses them: the gate's record in the table, what to ask again.

A segmenter is no part of a plan's identity, for filters only mark; but the rows of one plan are judged by one segmenter, whose
digest stands in the table's metadata under `gate.PLAN`. The rule of regeneration stands under `regenerate.PLAN`, so that
`factory status` counts further attempts as the job did.
"""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from factory.curation.mask_fidelity import MASK_SCORES, Acceptance, FittedMaskFidelity, acceptance
from schemas.regeneration import Attempts, Regeneration, next_attempts
from schemas.sample import RejectReason

if TYPE_CHECKING:
    from factory.storage import IndexSet, Table

_ROWS_AT_ONCE = 1 << 16


def record_gate(table: "Table", plan_id: str, fidelity: FittedMaskFidelity | None) -> list[str]:
    """Write down who judges the rows of this plan; notes for the operator.

    Args:
        table: its latest version.
        plan_id: of the rows.
        fidelity: the gate; None for a job without one, which must not mix unjudged rows among judged ones.

    Raises:
        ValueError: rows of the plan were judged by another segmenter.
    """
    key = f"gate.{plan_id}"
    text = table.metadata.get(key)
    if fidelity is None:
        if text is not None:
            raise ValueError(
                f"{table.uri}: the rows of plan {plan_id} are judged by a segmenter ({json.loads(text)['segmenter']}); give "
                "it as --segmenter again, or make another plan with another --seed"
            )
        return []
    notes = fidelity.notes()
    if text is not None:
        earlier = json.loads(text)["segmenter_digest"]
        if earlier != fidelity.segmenter_digest:
            raise ValueError(
                f"--segmenter {fidelity.segmenter}: the rows of plan {plan_id} were judged by another segmenter (digest "
                f"{earlier}, this one {fidelity.segmenter_digest}); use that one, or another --seed, or leave --segmenter out "
                "and run `factory score` afterwards, which scores all rows anew"
            )
    else:
        unjudged = table.count(f"plan_id = '{plan_id}'")
        if unjudged:
            notes.append(
                f"{unjudged} rows of this plan were made without a segmenter; `factory score {table.uri} --segmenter "
                f"{fidelity.segmenter}` scores them"
            )
    record = json.dumps(fidelity.record(), sort_keys=True)
    if text != record:
        table.set_metadata({key: record})
    return notes


def rejected_later(table: "Table") -> set[str]:
    """request_ids of rows that do not obey their mask by the columns that `factory score --segmenter` added.

    Empty for a table without these columns. The bounds are those that were given to that command; the stream's own
    verdicts stand in `stream_reject_reason`.
    """
    text = table.metadata.get("scores.mask_dice")
    if text is None or not {"mask_fidelity", "mask_dice"} <= set(table.schema.names):
        return set()
    record = json.loads(text)
    bounds = [f"mask_fidelity < {record['quantile']}"]
    if record["min_dice"] is not None:
        bounds.append(f"mask_dice < {record['min_dice']}")
    return {
        request_id
        for batch in table.batches(["request_id"], " OR ".join(bounds), batch_size=_ROWS_AT_ONCE)
        for request_id in batch.column("request_id").to_pylist()
    }


def record_regeneration(table: "Table", plan_id: str, rule: Regeneration | None) -> None:
    """Write the rule, or that there is none, into the table's metadata."""
    text = "" if rule is None else json.dumps(rule.to_json_value(), sort_keys=True)
    if table.metadata.get(f"regenerate.{plan_id}", "") != text:
        table.set_metadata({f"regenerate.{plan_id}": text})


def recorded_regeneration(table: "Table", plan_id: str) -> Regeneration | None:
    """The rule that the plan was last made with; None where nothing is tried again."""
    text = table.metadata.get(f"regenerate.{plan_id}")
    return None if not text else Regeneration.from_json_value(json.loads(text))


def attempts_of(
    table: "Table",
    plan_id: str,
    requested: "IndexSet",
    rule: Regeneration,
    given_up: np.ndarray | None = None,
) -> Attempts:
    """Further attempts of a plan, made and to make, by the effective verdicts of its committed rows.

    Args:
        table: its latest version is read.
        requested: first attempts that the job asks for.
        given_up: request indices in quarantine.
    """

    def verdicts() -> Iterator[tuple[np.ndarray, list[str | None]]]:
        columns = ["request_index", "accepted", "reject_reason"]
        for batch in table.query_batches(f"plan_id = '{plan_id}'", columns=columns, batch_size=_ROWS_AT_ONCE):
            rows = batch.to_pydict()
            yield (
                np.array(rows["request_index"], np.int64),
                [
                    None if accepted else reason or "unnamed"
                    for accepted, reason in zip(rows["accepted"], rows["reject_reason"])
                ],
            )

    return next_attempts(requested.contains, verdicts(), rule, given_up)


def acceptance_of(table: "Table", plan_id: str) -> list[Acceptance]:
    """How many rows of a plan obey their mask, by class and size quartile; empty where they were made without a segmenter.

    Whether another filter rejected a row first makes no difference.
    """
    text = table.metadata.get(f"gate.{plan_id}")
    if text is None:
        return []
    gate = FittedMaskFidelity.of_record(json.loads(text))
    names: list[str] = []
    scores: dict[str, list[float]] = {name: [] for name in MASK_SCORES}
    for batch in table.batches(["label_name", "scores"], f"plan_id = '{plan_id}'", batch_size=_ROWS_AT_ONCE):
        rows = batch.to_pydict()
        names += rows["label_name"]
        for row in rows["scores"]:
            found = dict(row or ())
            for name, values in scores.items():
                values.append(found.get(name, np.nan))
    columns = {name: np.array(values, np.float32) for name, values in scores.items()}
    return acceptance(names, columns["size_quartile"], gate.verdict(columns))


def regeneration_of(attempts: int, reasons: str, max_images: int | None) -> Regeneration | None:
    """The rule that --regenerate, --regenerate-reasons and --regenerate-budget describe; None for --regenerate 0.

    Raises:
        ValueError: a negative number, or a reason that does not exist.
    """
    if attempts == 0:
        return None
    names = tuple(dict.fromkeys(word.strip() for word in reasons.split(",") if word.strip()))
    unknown = [name for name in names if name not in set(RejectReason)]
    if unknown:
        raise ValueError(f"--regenerate-reasons: {unknown[0]!r} is none of {', '.join(RejectReason)}")
    return Regeneration(attempts=attempts, reasons=names, max_images=max_images)
