"""Captions from attributes, short enough for the text encoder."""

from collections.abc import Callable, Mapping

IMPORTANCE = (
    "diagnosis", "colour", "brightness", "size", "shape", "border", "position", "texture", "skin", "hair", "marks",
)  # fmt: skip
"""Attributes that a caption may name; the last ones go first where space is short."""


def write_caption(attributes: Mapping[str, str], *, name_class: bool = True) -> str:
    """One sentence of the attributes that are there, without a full stop; the empty string where none is.

    Args:
        attributes: values by name; names outside `IMPORTANCE` are not written.
        name_class: whether "diagnosis" is written, so that a class can be asked for.
    """
    get = attributes.get
    diagnosis = get("diagnosis") if name_class else None
    has_lesion = any(
        name in attributes for name in ("size", "shape", "colour", "brightness", "border", "texture")
    )
    adjectives = [get(name) for name in ("size", "shape", "colour")] + [diagnosis]
    noun = " ".join(word for word in (*adjectives, "lesion") if word)
    if not has_lesion and "position" not in attributes:
        noun = diagnosis or ""
    border, texture, brightness = get("border"), get("texture"), get("brightness")
    clauses = [
        noun,
        {None: None, "similar": "as bright as its surroundings"}.get(
            brightness, f"{brightness} than its surroundings"
        ),
        border and f"{border} border",
        texture and f"{texture} texture",
        _place(get("position")),
        get("skin") and f"on {get('skin')} skin",
        get("hair") and f"with {get('hair')}",
        get("marks") and f"with {get('marks')}",
    ]
    return ", ".join(clause for clause in clauses if clause)


def _place(position: str | None) -> str | None:
    if position is None:
        return None
    return f"on the {position}" if position in ("left", "right") else f"in the {position}"


def shorten(
    attributes: Mapping[str, str], fits: Callable[[str], bool], *, name_class: bool = True
) -> tuple[str, int]:
    """The caption of as many attributes as `fits` allows, and how many were left out, the least important first.

    Raises:
        ValueError: not even one attribute fits.
    """
    kept = {
        name: attributes[name]
        for name in IMPORTANCE
        if name in attributes and (name_class or name != "diagnosis")
    }
    total = len(kept)
    while True:
        caption = write_caption(kept, name_class=name_class)
        if fits(caption):
            return caption, total - len(kept)
        if len(kept) <= 1:
            raise ValueError(
                f"caption: the text encoder has no room for even {caption!r}; use a shorter prefix"
            )
        kept.popitem()


def shorten_text(caption: str, fits: Callable[[str], bool]) -> str:
    """A free caption cut at the end of a sentence, else of a clause, else of a word, so that it fits.

    Raises:
        ValueError: not even its first word fits.
    """
    text = " ".join(caption.split())
    for separators in (". ", ", ", "; ", " "):
        while not fits(text) and separators in text:
            text = text[: text.rindex(separators)].rstrip(" ,;")
            if separators == ". ":
                text += "."
                if fits(text):
                    return text
                text = text.removesuffix(".")
        if fits(text):
            return text
    raise ValueError(f"caption: the text encoder has no room for even {text!r}; use a shorter prefix")
