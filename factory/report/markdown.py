"""The sections of a page as one Markdown file: tables as tables; figures are only in the HTML page."""

from collections.abc import Sequence
from pathlib import Path

from factory.report.page import Cards, Commands, Facts, Grid, Plot, Section


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    if not rows:
        return "none"
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def section_markdown(section: Section) -> str:
    """One section, with its title as a second-level heading.

    Raises:
        ValueError: a section that has no form in Markdown (galleries, bars).
    """
    if isinstance(section, Grid):
        body = _table(section.header, section.rows)
    elif isinstance(section, Facts):
        body = _table(["", ""], [(name, f"`{_cell(value)}`") for name, value in section.facts.items()])
    elif isinstance(section, Cards):
        body = "\n".join(
            f"- **{_cell(c.label)}**: {_cell(c.value)} {_cell(c.about)}".rstrip() for c in section.cards
        )
    elif isinstance(section, Commands):
        body = "\n\n".join(f"{about}\n\n```sh\n{line}\n```" for about, line in section.commands.items())
    elif isinstance(section, Plot):
        body = "(figure: see the HTML page)"
    else:
        raise ValueError(f"{type(section).__name__}: has no form in Markdown")
    return "\n\n".join(filter(None, [f"## {section.title}", section.note, body]))


def markdown_report(
    path: str | Path, sections: Sequence[Section], *, title: str, subtitle: str = "", footer: str = ""
) -> Path:
    """Write the page's sections as Markdown and return the path. The file appears whole or not at all."""
    parts = [f"# {title}", subtitle, *(section_markdown(section) for section in sections), footer]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")
    partial.replace(path)
    return path
