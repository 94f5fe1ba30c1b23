"""Which public datasets `factory prepare` reads, what their licences say, and where they come from.

factory datasets
factory datasets show ddti

Nothing is downloaded: obtain a dataset from its owners, unpack it, and give its folder to `factory prepare`.
"""

from collections.abc import Sequence

from factory.datasets.layouts import LAYOUTS, get_layout


def description(name: str) -> str:
    """Everything known about one dataset, as text: contents, licence, source, citation and the folder expected.

    Raises:
        ValueError: there is none of that name; names the nearest.
    """
    layout = get_layout(name)
    path = "" if layout.is_made else " PATH"
    facts = {
        "what": layout.contents or layout.about,
        "licence": layout.licence,
        "allowed use": layout.allowed_use,
        "splits keep apart": layout.unit,
        "where to obtain": layout.obtain or "not stated",
        "cite": layout.citation or "nothing stated",
    }
    lines = [f"{name}: {layout.about}", ""]
    lines += [f"{key + ':':<19}{value}" for key, value in facts.items()]
    if layout.tree:
        lines += ["", "expected:", "", *(f"  {line}" for line in layout.tree.rstrip("\n").split("\n"))]
    lines += ["", f"next: factory prepare {name}{path} --out real.lance"]
    return "\n".join(lines)


def command(argv: Sequence[str]) -> int:
    """`factory datasets` and `factory datasets show NAME`."""
    from rich.console import Console
    from rich.table import Table

    if argv and argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if argv:
        if argv[0] != "show" or len(argv) != 2:
            raise ValueError(f"factory datasets {' '.join(argv)}: want nothing or `show NAME`")
        print(description(argv[1]))
        return 0
    table = Table(show_lines=True)
    for heading in ("name", "what", "licence", "where to obtain", "cite"):
        table.add_column(heading, no_wrap=heading == "name")
    for name, layout in LAYOUTS.items():
        table.add_row(name, layout.contents, layout.licence, layout.obtain, layout.citation)
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table, markup=False)
    console.print(
        "The folder one expects: factory datasets show NAME. Nothing is downloaded.", highlight=False
    )
    return 0


if __name__ == "__main__":
    import sys

    from jobs.cli import run_verb

    sys.exit(run_verb("datasets", sys.argv[1:]))
