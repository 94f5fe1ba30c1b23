"""New captions for synthesis without a language model: observed attributes of one class, put together anew."""

from collections.abc import Callable, Iterable, Sequence

from factory.captions.attributes import GEOMETRY
from factory.captions.table import Caption, expanded_caption
from factory.captions.writing import IMPORTANCE, shorten
from schemas.identity import random_generator

RECOMBINATION = "recombination"
_TOGETHER = ("position", "size", *GEOMETRY)
"""Attributes that describe one mask: they stay with the row that gives the position."""
_TRIES = 200


def recombine(
    captions: Sequence[Caption],
    count: int,
    *,
    label: str,
    fits: Callable[[str], bool],
    min_shared: int = 2,
    seed: int = 0,
    name_class: bool = True,
    taken: Iterable[str] = (),
) -> list[Caption]:
    """At most `count` new captions of one class; fewer where the class has no more combinations to give.

    Two rows that share at least `min_shared` attribute values (beside the class) are drawn; every other attribute
    comes from one or the other, so that each combination lies between two observed ones. Paper 002 lets a language
    model write new prompts from old ones.

    Args:
        captions: of the class, with attributes; others are left out.
        taken: further texts that may not be repeated.

    Raises:
        ValueError: fewer than two captions of the class have attributes.
    """
    rows = [caption for caption in captions if len(_values(caption)) > 1]
    if len(rows) < 2:
        raise ValueError(
            f"label {label!r}: {len(rows)} of {len(captions)} captions have attributes, recombination needs two; use "
            "`--captioner template`, or `--language-model` to expand captions of a vision-language model"
        )
    rng = random_generator(f"captions/{seed}/{label}", "recombine")
    seen = {caption.caption for caption in captions} | set(taken)
    made: list[Caption] = []
    for _ in range(_TRIES * count):
        if len(made) == count:
            break
        one, other = (rows[int(i)] for i in rng.choice(len(rows), 2, replace=False))
        mixed = _mix(one, other, min_shared, rng.random)
        if mixed is None:
            continue
        text, _ = shorten(mixed, fits, name_class=name_class)
        if text not in seen:
            seen.add(text)
            made.append(expanded_caption(label, text, RECOMBINATION, mixed))
    return made


def _values(caption: Caption) -> dict[str, str]:
    return {name: value for name, value in caption.attributes.items() if name in IMPORTANCE}


def _mix(one: Caption, other: Caption, min_shared: int, draw: Callable[[], float]) -> dict[str, str] | None:
    """Attributes of both rows, each from one of them; None where they share too few."""
    a, b = _values(one), _values(other)
    shared = sum(1 for name in a if name != "diagnosis" and b.get(name) == a[name])
    if shared < min_shared:
        return None
    placed = one if draw() < 0.5 else other
    mixed = {}
    for name in IMPORTANCE:
        source = placed.attributes if name in _TOGETHER else (one if draw() < 0.5 else other).attributes
        if name in source:
            mixed[name] = source[name]
    return mixed | {name: placed.attributes[name] for name in GEOMETRY if name in placed.attributes}
