"""The stream's verdicts again with other thresholds, plan by plan, from stored scores: for `factory curate --rejudge`."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from factory.curation.mask_fidelity import FittedMaskFidelity
from factory.curation.rejudge import Override, judge_again, score_columns, with_thresholds
from jobs.curation_rows import SyntheticRows

if TYPE_CHECKING:
    from factory.storage import Table

_ROWS_AT_ONCE = 1 << 14


@dataclass(frozen=True, kw_only=True)
class Rejudged:
    """New stream verdicts.

    Attributes:
        reasons: of each row, in the order of the rows.
        changed: rows whose verdict is another one than the stream's.
        notes: for the operator.
    """

    reasons: list[str | None] = field(repr=False)
    changed: int
    notes: tuple[str, ...] = ()


def rejudge(
    table: "Table", real_table: "Table", rows: SyntheticRows, overrides: Sequence[Override]
) -> Rejudged:
    """Verdicts of every plan's filters, fitted again on the real training rows, with thresholds replaced.

    Without overrides the stream's own verdicts must come out again; rows where they do not are told.

    Raises:
        ValueError: a plan is not recorded or was made with other real rows, or a threshold that is not there.
    """
    from factory.storage import real_digest

    position = {request_id: row for row, request_id in enumerate(rows.request_ids)}
    reasons = list(rows.stream_reasons)
    digest = real_digest(real_table)
    differing = 0
    for key, text in sorted(table.metadata.items()):
        if not key.startswith("plan."):
            continue
        plan = json.loads(text)
        if plan["real_digest"] != digest:
            raise ValueError(
                f"--rejudge: plan {key[5:]} of {table.uri} was made with other real rows than the training split of "
                f"{real_table.uri}; give that table as --real"
            )
        filters, refit = _fitted(plan, real_table)
        gate = table.metadata.get(f"gate.{key[5:]}")
        if gate is not None:  # the job's --segmenter judged too
            filters = (*filters, FittedMaskFidelity.of_record(json.loads(gate)))
        changed = with_thresholds(filters, overrides, refit)
        where = f"plan_id = '{key[5:]}'"
        columns = ["request_id", "scores", "stream_reject_reason"]
        for batch in table.batches(columns, filter=where, batch_size=_ROWS_AT_ONCE):
            scores = score_columns([dict(row or ()) for row in batch.column("scores").to_pylist()])
            stream = batch.column("stream_reject_reason").to_pylist()
            again = judge_again(filters, scores, stream)
            differing += sum(old != new for old, new in zip(stream, again))
            verdicts = judge_again(changed, scores, stream)
            for request_id, verdict in zip(batch.column("request_id").to_pylist(), verdicts):
                reasons[position[request_id]] = verdict
    plans = {key[5:] for key in table.metadata if key.startswith("plan.")}
    if not plans:
        raise ValueError(f"--rejudge: {table.uri} records no plan, so its filters are not known")
    notes = []
    if differing:
        notes.append(
            f"WARNING: with the recipe's own thresholds {differing} rows are judged otherwise than the stream did; "
            "the code or the embedder of the real table changed since"
        )
    moved = sum(old != new for old, new in zip(rows.stream_reasons, reasons))
    return Rejudged(reasons=reasons, changed=moved, notes=tuple(notes))


def _fitted(plan: dict[str, Any], real_table: "Table") -> tuple[tuple[Any, ...], Callable[[Any], Any]]:
    """The filters of a plan's recipe, fitted as the stream fitted them, and what fits another one on the same rows."""
    from factory.embedding import EmbedderSpec
    from factory.imaging import decode_rows
    from factory.storage import real_rows
    from jobs.recipe_args import parse_recipe
    from jobs.synthesis_plan import fit_filters

    recipe = parse_recipe(plan["recipe"], plan["overrides"])
    stored = real_rows(real_table.uri, splits=("train",), version=real_table.version)
    rows = decode_rows(stored, recipe.generator.resolution)
    embeddings = np.stack(stored["embedding"].to_numpy(zero_copy_only=False)).astype(np.float32)
    fitted = fit_filters(recipe, rows, embeddings, EmbedderSpec.from_json(real_table.metadata["embedder"]))
    return fitted, lambda source: source.fit(rows, embeddings)
