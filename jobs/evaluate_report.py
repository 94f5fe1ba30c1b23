"""One page of everything that was found: the arms, the curves, the images, and the papers' tables.

    factory evaluate report runs/images runs/downstream runs/ratio --out runs/report

Takes folders of `factory evaluate images`, `factory evaluate downstream`, `factory explore ratio` and `factory explore
sampler`, several of each where there are. What the papers' tables need and was not run is named with its command.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from tyro.conf import Positional

from jobs.evaluate_plan import RESULTS

if TYPE_CHECKING:
    from factory.report import Section


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `factory evaluate report`."""

    results: Positional[tuple[str, ...]]
    """Folders of results."""
    out: str
    """Folder of report.html and report.md."""
    title: str = "Does the synthetic data help?"
    """Of the page."""


def read_results(folder: str) -> dict[str, Any]:
    """The results in a folder, with what kind they are and where they came from.

    Raises:
        FileNotFoundError: no results there.
        ValueError: a file of another program.
    """
    path = Path(folder) / RESULTS if Path(folder).is_dir() else Path(folder)
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: no {RESULTS} there; `factory evaluate` and `factory explore` write such folders with --out"
        )
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}: want an object of results")
    if "kind" not in record:
        kinds = {"ratio": {"curves", "chosen", "metric"}, "sampler": {"searches", "summary"}}
        record["kind"] = next((kind for kind, needed in kinds.items() if needed <= set(record)), None)
    if record["kind"] not in ("images", "downstream", "ratio", "sampler"):
        raise ValueError(f"{path}: not a result of `factory evaluate` or `factory explore`")
    return record | {"folder": folder}


def make_sections(records: Sequence[dict[str, Any]]) -> list["Section"]:
    """The page: downstream results first, then curves, images, and the papers' tables."""
    import dataclasses

    from factory.report.evaluation import (
        downstream_sections,
        images_sections,
        ratio_sections,
        sampler_sections,
    )
    from factory.report.paper_tables import paper_tables

    makers = {
        "downstream": downstream_sections,
        "ratio": ratio_sections,
        "sampler": sampler_sections,
        "images": images_sections,
    }
    sections: list[Section] = []
    for kind, make in makers.items():
        found = [record for record in records if record["kind"] == kind]
        for record in found:
            # Of several results of a kind each title says which.
            about = f" ({record['folder']})" if len(found) > 1 else ""
            sections += [dataclasses.replace(s, title=s.title + about) for s in make(record)]  # type: ignore[type-var]
    for table in paper_tables(records):
        sections += table.sections()
    return sections


def run(args: Args) -> tuple[Path, Path]:
    """Write the page in both forms.

    Raises:
        FileNotFoundError, ValueError: a folder without results.
    """
    from factory.report import html_report
    from factory.report.markdown import markdown_report

    if not args.results:
        raise ValueError("RESULTS: want one folder at least")
    records = [read_results(folder) for folder in dict.fromkeys(args.results)]
    sections = make_sections(records)
    subtitle = "From " + ", ".join(record["folder"] for record in records)
    folder = Path(args.out)
    return (
        html_report(folder / "report.html", sections, title=args.title, subtitle=subtitle),
        markdown_report(folder / "report.md", sections, title=args.title, subtitle=subtitle),
    )


def command(argv: Sequence[str]) -> int:
    """`factory evaluate report`."""
    args = tyro.cli(Args, args=list(argv), prog="factory evaluate report", description=__doc__)
    written = run(args)
    print(f"wrote {' and '.join(map(str, written))}")
    return 0
