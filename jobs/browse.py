"""Look through a table in a browser: filter, gallery with mask contours, provenance of a row.

    factory browse synthetic.lance

Needs the extra `browse` (requirements/browse.txt). Serves on loopback only, to this machine.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tyro.conf import Positional

_HIDDEN = ("image", "mask", "requested_mask", "embedding")
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `factory browse`."""

    table: Positional[str]
    """Real or synthetic table."""
    tag: str | None = None
    """A tagged version instead of the latest."""
    port: int = 7860
    """Port on 127.0.0.1."""
    limit: int = 64
    """Images per page."""


def page(
    uri: str, filter: str, offset: int, limit: int, tag: str | None = None
) -> list[tuple[np.ndarray, str, str]]:
    """One page of the table: picture (uint8, mask contour drawn in), caption, and the row as JSON text.

    Raises:
        ValueError: the filter is not understood (the columns there are, are named).
    """
    from factory.imaging import decode_png
    from factory.report import contact_sheet
    from factory.storage import open_table
    from jobs.query import without_test_rows

    table = open_table(uri, tag=tag)
    shown, _ = without_test_rows(table, filter)
    found = table.query(shown, limit=offset + limit).slice(offset)
    cells = []
    for row in found.to_pylist():
        mask = None if row["mask"] is None else decode_png(row["mask"])
        picture = contact_sheet([decode_png(row["image"])], [mask], columns=1, cell=256)
        verdict = row.get("reject_reason") or row.get("stream_reject_reason") or ""
        details = {name: value for name, value in row.items() if name not in _HIDDEN}
        caption = " · ".join(filter_text for filter_text in (row["label_name"], verdict) if filter_text)
        cells.append((np.asarray(picture), caption, json.dumps(details, indent=2, default=str)))
    return cells


def build(args: Args) -> Any:
    """The gradio page.

    Raises:
        ValueError: gradio is not installed.
    """
    try:
        import gradio
    except ImportError as error:
        raise ValueError("factory browse needs gradio: install requirements/browse.txt") from error

    def show(filter_text: str, number: float) -> tuple[list[tuple[np.ndarray, str]], list[str], str]:
        try:
            cells = page(args.table, filter_text, (int(number) - 1) * args.limit, args.limit, args.tag)
        except ValueError as error:
            raise gradio.Error(str(error)) from error
        return [(picture, caption) for picture, caption, _ in cells], [text for *_, text in cells], ""

    def pick(details: list[str], event: gradio.SelectData) -> str:
        return details[event.index]

    with gradio.Blocks(title=args.table, analytics_enabled=False) as blocks:
        gradio.Markdown(f"## {args.table}")
        with gradio.Row():
            filter_text = gradio.Textbox(label="filter", placeholder="accepted AND label_name = 'malignant'")
            number = gradio.Number(label="page", value=1, minimum=1, precision=0)
        gallery = gradio.Gallery(columns=8, height="auto", label="rows")
        details = gradio.State([])
        row = gradio.Code(language="json", label="row")
        outputs = [gallery, details, row]
        filter_text.submit(show, [filter_text, number], outputs)
        number.change(show, [filter_text, number], outputs)
        gallery.select(pick, [details], row)
        blocks.load(show, [filter_text, number], outputs)
    return blocks


def launch_options(args: Args) -> dict[str, Any]:
    """What gradio is started with: loopback only, no public link. Given outright, so that no variable changes it."""
    return {"server_name": LOOPBACK, "server_port": args.port, "share": False}


def command(argv: Sequence[str]) -> int:
    """`factory browse`; runs until interrupted."""
    import tyro

    from factory.storage import open_table

    args = tyro.cli(Args, args=list(argv), prog="factory browse", description=__doc__)
    open_table(args.table, tag=args.tag)
    build(args).launch(**launch_options(args))
    return 0
