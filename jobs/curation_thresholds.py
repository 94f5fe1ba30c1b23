"""From which cosine on two synthetic rows are duplicates: given, or from real images, for all classes or per class."""

from collections.abc import Mapping, Sequence

import numpy as np

from factory.curation.dedup import real_similarity_quantile
from jobs.curation_rows import RealRows

MIN_CLASS_GROUPS = 10
"""Patients or groups of a class below which its own quantile says nothing: the one of all classes is taken."""


def parse_similarity(given: float | str | None) -> float | dict[str, float] | None:
    """`--duplicate-similarity`: one number, or CLASS=NUMBER,CLASS=NUMBER.

    Raises:
        ValueError: neither of them, or a number outside (0, 1].
    """
    if given is None:
        return None
    values: dict[str, float] = {}
    for item in str(given).split(","):
        name, equals, text = item.strip().rpartition("=")
        try:
            value = float(text)
            if (equals and not name) or not 0 < value <= 1 or name in values:
                raise ValueError
        except ValueError:
            raise ValueError(
                f"--duplicate-similarity {given}: {item.strip()!r} is outside (0, 1]; want one number, or one per "
                "class such as benign=0.97,malignant=0.95"
            ) from None
        values[name] = value
    if "" in values and len(values) > 1:
        raise ValueError(f"--duplicate-similarity {given}: want one number, or one per class, not both")
    return values.get("", values) if "" in values else values


def duplicate_limits(
    given: float | Mapping[str, float] | None,
    classes: Sequence[str],
    real: RealRows,
    *,
    quantile: float,
    per_class: bool,
    num_threads: int | None,
) -> tuple[dict[str, float], list[str]]:
    """Least cosine of duplicates per class, and what the operator should know of it.

    Args:
        given: on the command line; classes that it does not name get the one from real images.
        classes: class names of the synthetic table.
        real: training rows.
        quantile: of the similarity of real images to the nearest of another group.
        per_class: take that quantile among the images of each class.
        num_threads: for FAISS.

    Raises:
        ValueError: a class that is not in the table, or no threshold can be derived.
    """
    if isinstance(given, float):
        return dict.fromkeys(classes, given), []
    named = dict(given or {})
    unknown = sorted(set(named) - set(classes))
    if unknown:
        raise ValueError(
            f"--duplicate-similarity: class {unknown[0]!r} is not in the table, which has {', '.join(classes)}"
        )
    notes: list[str] = []
    limits: dict[str, float] = {}
    overall: float | None = None
    for name in classes:
        members = np.flatnonzero(np.asarray(real.labels, dtype=object) == name)
        groups = [real.groups[k] for k in members]
        if name in named:
            limits[name] = named[name]
        elif per_class and len(set(groups)) >= MIN_CLASS_GROUPS:
            limits[name] = real_similarity_quantile(real.embeddings[members], groups, quantile, num_threads)
        else:
            if overall is None:
                overall = real_similarity_quantile(real.embeddings, real.groups, quantile, num_threads)
            limits[name] = overall
            if per_class:
                notes.append(
                    f"class {name}: {len(set(groups))} groups of real images are too few for a threshold of its own "
                    f"(want {MIN_CLASS_GROUPS}); that of all classes is taken"
                )
    return limits, notes
