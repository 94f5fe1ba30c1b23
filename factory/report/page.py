"""One self-contained HTML page from a list of sections.

Each section is a frozen dataclass that writes itself. Everything is inline, no script, no network: the file
opens offline and can be mailed. Text from outside is escaped; images are lossless PNG.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from factory.imaging import encode_png
from factory.report.figures import figure_svg
from factory.report.sheets import PALETTE, require_equal_lengths

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Tone = Literal["", "good", "warn", "bad"]


def _escape(value: object) -> str:
    return html.escape(str(value), quote=True)


def _caption(text: str) -> str:
    """Escaped, with places to break at underscores: reasons are long words for a narrow column."""
    return f"<figcaption>{_escape(text).replace('_', '_<wbr>')}</figcaption>"


def _image(image: np.ndarray, mask: np.ndarray | None, alt: str) -> str:
    """An image with its mask as an SVG contour; pointing at it hides the contour."""
    height, width = image.shape[:2]
    data = base64.b64encode(encode_png(image)).decode()
    contour = "" if mask is None or not mask.any() else _contours(mask)
    return (
        f'<div class="frame"><img width="{width}" height="{height}" alt="{_escape(alt)}" '
        f'src="data:image/png;base64,{data}">{contour}</div>'
    )


def _contours(mask: np.ndarray) -> str:
    from skimage.measure import find_contours

    height, width = mask.shape
    paths = []
    for label in np.unique(mask[mask > 0]):
        lines = find_contours(np.pad((mask == label).astype(float), 1), 0.5)
        # find_contours counts from pixel centres of the padded mask; SVG from the corner of the image.
        data = "".join(
            "M" + "L".join(f"{x - 0.5:.1f} {y - 0.5:.1f}" for y, x in line) + "Z" for line in lines
        )
        paths.append(f'<path class="m{(int(label) - 1) % len(PALETTE) + 1}" d="{data}"/>')
    return f'<svg viewBox="0 0 {width} {height}" aria-hidden="true">{"".join(paths)}</svg>'


class Section(Protocol):
    """A titled part of a page."""

    @property
    def title(self) -> str: ...

    @property
    def note(self) -> str: ...

    def body(self) -> str:
        """Its HTML, escaped."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """One figure of a summary: what it is, its value, and a word about it."""

    label: str
    value: str
    about: str = ""
    tone: Tone = ""


@dataclass(frozen=True, kw_only=True)
class Cards:
    """Summary figures."""

    title: str
    note: str = ""
    cards: Sequence[Card]

    def body(self) -> str:
        return "".join(
            f'<div class="card {card.tone}"><span class="label">{_escape(card.label)}</span>'
            f'<b>{_escape(card.value)}</b><div class="about">{_escape(card.about)}</div></div>'
            for card in self.cards
        ).join(('<div class="cards">', "</div>"))


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Images with mask contours and captions; uint8 (H, W) or (H, W, 3), masks uint8 (H, W) or None."""

    title: str
    note: str = ""
    images: Sequence[np.ndarray]
    masks: Sequence[np.ndarray | None] | None = None
    captions: Sequence[str] | None = None

    def __post_init__(self) -> None:
        require_equal_lengths(len(self.images), masks=self.masks, captions=self.captions)

    def body(self) -> str:
        if not self.images:
            return '<p class="empty">none</p>'
        masks = self.masks or [None] * len(self.images)
        captions = self.captions or [""] * len(self.images)
        figures = "".join(
            f"<figure>{_image(image, mask, caption)}{_caption(caption)}</figure>"
            for image, mask, caption in zip(self.images, masks, captions, strict=True)
        )
        return f'<div class="gallery">{figures}</div>'


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Counts as bars of a total: funnels, reject reasons."""

    title: str
    note: str = ""
    counts: Mapping[str, int]
    total: int
    tone: Tone = ""

    def body(self) -> str:
        if not self.counts:
            return '<p class="empty">none</p>'
        rows = []
        for name, count in self.counts.items():
            share = count / max(self.total, 1)
            rows.append(
                f'<tr><td class="name">{_escape(name)}</td><td class="number">{count}</td><td class="number">{share:.1%}</td>'
                f'<td class="bar"><div class="track"><div class="fill {self.tone}" style="width:{min(share, 1):.2%}">'
                "</div></div></td></tr>"
            )
        return f"<table>{''.join(rows)}</table>"


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A matplotlib figure, as SVG in the page's colours."""

    title: str
    note: str = ""
    figure: "Figure"

    def body(self) -> str:
        return f'<div class="plot">{figure_svg(self.figure, self.title)}</div>'


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A synthetic image and the real one nearest to it."""

    synthetic: np.ndarray
    real: np.ndarray
    synthetic_mask: np.ndarray | None = None
    real_mask: np.ndarray | None = None
    synthetic_caption: str
    real_caption: str
    similarity: float
    verdict: str = ""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Synthetic images beside their nearest real training images."""

    title: str
    note: str = ""
    pairs: Sequence[Pair]

    def body(self) -> str:
        if not self.pairs:
            return '<p class="empty">none</p>'
        blocks = []
        for pair in self.pairs:
            left = _image(pair.synthetic, pair.synthetic_mask, pair.synthetic_caption)
            right = _image(pair.real, pair.real_mask, pair.real_caption)
            verdict = f" · {_escape(pair.verdict)}" if pair.verdict else ""
            blocks.append(
                f'<div class="pair"><div><figure>{left}<figcaption>{_escape(pair.synthetic_caption)}</figcaption>'
                f"</figure><figure>{right}<figcaption>{_escape(pair.real_caption)}</figcaption></figure></div>"
                f"<p>cosine <b>{pair.similarity:.3f}</b>{verdict}</p></div>"
            )
        return f'<div class="pairs">{"".join(blocks)}</div>'


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """How long a stage took and how much of it was fixed: imports, loading, starting Ray; seconds."""

    name: str
    seconds: float
    fixed: float = 0.0
    about: str = ""


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Time per stage, fixed overhead apart."""

    title: str
    note: str = ""
    stages: Sequence[StageTime]

    def body(self) -> str:
        longest = max((stage.seconds for stage in self.stages), default=0.0) or 1.0
        rows = []
        for stage in self.stages:
            fixed, work = (value / longest for value in (stage.fixed, max(stage.seconds - stage.fixed, 0.0)))
            rows.append(
                f'<tr><td class="name short">{_escape(stage.name)}</td><td class="number">{stage.seconds:.1f} s</td>'
                f'<td class="number">{stage.fixed:.1f} s</td><td class="bar"><div class="track">'
                f'<div class="fill fixed" style="width:{fixed:.2%}"></div>'
                f'<div class="fill" style="width:{work:.2%}"></div></div></td><td>{_escape(stage.about)}</td></tr>'
            )
        total = sum(stage.seconds for stage in self.stages)
        fixed_total = sum(stage.fixed for stage in self.stages)
        head = (
            '<tr><th>stage</th><th class="number">time</th><th class="number">of it fixed</th><th>'
            '<span class="key fill fixed"></span>fixed<span class="key fill"></span>work</th><th></th></tr>'
        )
        last = (
            f'<tr><td><b>all</b></td><td class="number"><b>{total:.1f} s</b></td>'
            f'<td class="number"><b>{fixed_total:.1f} s</b></td><td></td><td></td></tr>'
        )
        return f'<div class="wide"><table>{head}{"".join(rows)}{last}</table></div>'


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table; cells that are numbers stand to the right."""

    title: str
    note: str = ""
    header: Sequence[str]
    rows: Sequence[Sequence[str | int | float]]

    def body(self) -> str:
        numeric = [
            bool(self.rows) and all(isinstance(row[column], (int, float)) for row in self.rows)
            for column in range(len(self.header))
        ]
        kind = [' class="number"' if is_number else ' class="text"' for is_number in numeric]
        head = "".join(f"<th{k}>{_escape(name)}</th>" for k, name in zip(kind, self.header, strict=True))
        lines = "".join(
            "<tr>" + "".join(f"<td{k}>{_escape(v)}</td>" for k, v in zip(kind, row, strict=True)) + "</tr>"
            for row in self.rows
        )
        return f'<div class="wide"><table><tr>{head}</tr>{lines}</table></div>'


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Names and values: provenance, versions."""

    title: str
    note: str = ""
    facts: Mapping[str, object]

    def body(self) -> str:
        rows = "".join(
            f'<tr><td class="name">{_escape(name)}</td><td class="text"><code>{_escape(value)}</code></td></tr>'
            for name, value in self.facts.items()
        )
        return f"<table>{rows}</table>"


@dataclass(frozen=True, kw_only=True)
class Commands:
    """What to run next: what for, and the command."""

    title: str
    note: str = ""
    commands: Mapping[str, str]

    def body(self) -> str:
        items = (f"<dt>{_escape(a)}</dt><dd><pre>{_escape(c)}</pre></dd>" for a, c in self.commands.items())
        return f"<dl>{''.join(items)}</dl>"


def html_report(
    path: str | Path, sections: Sequence[Section], *, title: str, subtitle: str = "", footer: str = ""
) -> Path:
    """Write one self-contained page and return its path. The file appears whole or not at all."""
    css = (Path(__file__).parents[1] / "assets" / "report.css").read_text()
    links = "".join(f'<a href="#s{number}">{_escape(s.title)}</a>' for number, s in enumerate(sections))
    parts = []
    for number, section in enumerate(sections):
        note = f'<p class="note">{_escape(section.note)}</p>' if section.note else ""
        parts.append(
            f'<section id="s{number}"><h2>{_escape(section.title)}</h2>{note}{section.body()}</section>'
        )
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_escape(title)}</title><style>\n{css}</style></head>\n<body><main>\n"
        f"<header><h1>{_escape(title)}</h1><p>{_escape(subtitle)}</p></header>\n<nav>{links}</nav>\n"
        + "\n".join(parts)
        + f"\n<footer>{_escape(footer)}</footer>\n</main></body></html>\n"
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path
