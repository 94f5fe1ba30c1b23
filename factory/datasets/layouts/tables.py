"""Tables that come with public datasets, CSV and XLSX, and which files their rows are about.

XLSX is read with the standard library: cells of the first sheet as text, no formulas, no styles (ECMA-376
part 1, 18.2–18.4). XML with a document type is refused, so that no entity is expanded, and a part above 64
MiB too.
"""

import csv
import posixpath
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree
from xml.parsers import expat

from factory.datasets.layout import Problem, natural_order

_MAX_PART = 64 << 20
_MAIN = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
_LINK = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}id"


class TableRow(NamedTuple):
    """One row: `where` it is ("bus_data.csv row 3", 1-based as an editor counts) and its values by column."""

    where: str
    values: Mapping[str, str]


def read_table(path: Path, columns: Sequence[str], *, delimiter: str = ",") -> list[TableRow]:
    """Rows below the first line that has all of `columns`; empty rows are left out.

    Args:
        path: a CSV file (UTF-8), or one that ends in .xlsx.
        columns: names that must be there; spaces at the ends, line breaks and capitals do not matter. They come
            back as written here, all other columns as the file has them.
        delimiter: of a CSV file.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: not a readable table, or a column is missing; names the file and the columns.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a table with {', '.join(columns)}")
    grid = _xlsx_grid(path) if path.suffix.lower() == ".xlsx" else _csv_grid(path, delimiter)
    wanted = {column.lower(): column for column in columns}
    heads = [[" ".join(cell.split()) for cell in cells] for cells in grid]
    start = next(
        (i for i, line in enumerate(heads) if wanted.keys() <= {head.lower() for head in line}), None
    )
    if start is None:
        first = ", ".join(grid[0]) if grid else "nothing"
        raise ValueError(f"{path}: no line with the columns {', '.join(columns)}; its first line has {first}")
    names = [wanted.get(head.lower(), head) for head in heads[start]]
    return [
        TableRow(f"{path.name} row {number}", dict(zip(names, cells + [""] * (len(names) - len(cells)))))
        for number, cells in enumerate(grid[start + 1 :], start=start + 2)
        if any(cells)
    ]


def _csv_grid(path: Path, delimiter: str) -> list[list[str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            return [[cell.strip() for cell in row] for row in csv.reader(stream, delimiter=delimiter)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a UTF-8 CSV file ({error}); download it again") from error


def parse_xml(data: bytes, name: str) -> ElementTree.Element:
    """The root element.

    Raises:
        ValueError: not well formed, or with a document type.
    """

    def refuse(*declaration: object) -> None:
        raise ValueError(f"{name}: XML with a document type declaration; remove it")

    guard = expat.ParserCreate()
    guard.StartDoctypeDeclHandler = refuse
    try:
        guard.Parse(data, True)
        return ElementTree.fromstring(data)
    except (expat.ExpatError, ElementTree.ParseError, LookupError) as error:
        raise ValueError(f"{name}: not readable XML ({error}); download it again") from error


def _xlsx_grid(path: Path) -> list[list[str]]:
    """Cells of the first sheet as text; rows and columns that the file leaves out are empty."""
    try:
        with zipfile.ZipFile(path) as archive:
            links = {
                link.get("Id"): link.get("Target", "")
                for link in _part(archive, "xl/_rels/workbook.xml.rels")
            }
            sheets = _part(archive, "xl/workbook.xml").find(f"{_MAIN}sheets")
            target = links[sheets[0].get(_LINK)] if sheets is not None and len(sheets) else None
            if target is None:
                raise ValueError("it has no sheet")
            strings: list[str] = []
            if "xl/sharedStrings.xml" in archive.namelist():
                strings = [_text(item) for item in _part(archive, "xl/sharedStrings.xml")]
            sheet = _part(archive, posixpath.normpath(posixpath.join("/xl", target)).lstrip("/"))
            return _grid_of(sheet, strings)
    except (zipfile.BadZipFile, KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{path}: not a readable XLSX file ({error}); download it again") from error


def _part(archive: zipfile.ZipFile, name: str) -> ElementTree.Element:
    size = archive.getinfo(name).file_size
    if size > _MAX_PART:
        raise ValueError(f"{name} is {size >> 20} MiB, more than {_MAX_PART >> 20}")
    return parse_xml(archive.read(name), name)


def _text(item: ElementTree.Element) -> str:
    """Text of a string item: of itself or of its runs, without phonetic hints."""
    runs = [item, *item.findall(f"{_MAIN}r")]
    return "".join(run.findtext(f"{_MAIN}t") or "" for run in runs).strip()


def _grid_of(sheet: ElementTree.Element, strings: Sequence[str]) -> list[list[str]]:
    grid: list[list[str]] = []
    for row in sheet.iter(f"{_MAIN}row"):
        number = int(row.get("r", len(grid) + 1))
        if not len(grid) < number <= len(grid) + 10_000:
            raise ValueError(f"row {number} after row {len(grid)}")
        grid.extend([] for _ in range(number - len(grid)))
        for cell in row:
            column = _column(cell.get("r", ""), len(grid[-1]))
            grid[-1].extend([""] * (column + 1 - len(grid[-1])))
            grid[-1][column] = _cell_text(cell, strings)
    return grid


def _column(reference: str, following: int) -> int:
    """Index of a cell such as 'B7': 1; of one without reference, the one that follows."""
    letters = re.match(r"[A-Z]{1,3}(?=\d|$)", reference)
    if letters is None:
        return following
    index = 0
    for letter in letters[0]:
        index = index * 26 + ord(letter) - ord("A") + 1
    return index - 1


def _cell_text(cell: ElementTree.Element, strings: Sequence[str]) -> str:
    kind = cell.get("t", "n")
    if kind == "inlineStr":
        inline = cell.find(f"{_MAIN}is")
        return "" if inline is None else _text(inline)
    value = (cell.findtext(f"{_MAIN}v") or "").strip()
    if kind == "s":
        return strings[int(value)]
    if kind == "n" and value:
        number = float(value)
        return str(int(number)) if number.is_integer() else repr(number)
    return value


def keyed_rows(rows: Iterable[TableRow], column: str, problems: list[Problem]) -> dict[str, TableRow]:
    """Rows by their value of `column`, which must be a plain name: there, not twice, no folders in it."""
    keyed: dict[str, TableRow] = {}
    for row in rows:
        name = row.values[column]
        if not name:
            problems.append(Problem(source_path=row.where, what=f"no {column}", remedy="correct the row"))
        elif not is_plain_name(name):
            what = f"{column} {name!r} is no plain file name"
            problems.append(Problem(source_path=row.where, what=what, remedy="correct the row"))
        elif name in keyed:
            what = f"a second row for {name} (the first: {keyed[name].where})"
            problems.append(Problem(source_path=row.where, what=what, remedy="remove one of them"))
        else:
            keyed[name] = row
    return keyed


def is_plain_name(name: str) -> bool:
    """Whether `name` stays in the folder that it is looked up in."""
    return name not in ("", ".", "..") and not any(mark in name for mark in "/\\\0:")


class Match(NamedTuple):
    """A file and the row about it."""

    key: str
    file: Path
    row: TableRow
    label: str


def matched(
    files: Mapping[str, Path],
    rows: Mapping[str, TableRow],
    column: str,
    labels: Mapping[str, str],
    root: Path,
    problems: list[Problem],
) -> Iterator[Match]:
    """Files with the rows of the same key and their label, in the order of the files' names.

    A file without row, a row without file and a value of `column` that is not in `labels` (capitals do not matter)
    become problems.
    """
    for key in sorted(files, key=natural_order):
        if key not in rows:
            what = f"no row for {key} in the table"
            problems.append(
                Problem(source_path=files[key].relative_to(root).as_posix(), what=what, remedy="add one")
            )
            continue
        row = rows[key]
        label = labels.get(row.values[column].lower())
        if label is None:
            what = f"{column} {row.values[column]!r} is none of {', '.join(labels)}"
            problems.append(Problem(source_path=row.where, what=what, remedy="correct the row"))
        else:
            yield Match(key, files[key], row, label)
    for key in sorted(rows.keys() - files.keys(), key=natural_order):
        what = f"row without image: {key}"
        problems.append(
            Problem(source_path=rows[key].where, what=what, remedy="add the image or remove the row")
        )


def attributes_of(row: TableRow, columns: Mapping[str, str]) -> dict[str, str]:
    """Attribute name → value, for the columns (name → attribute) that the row has and that are not empty."""
    return {name: row.values[column] for column, name in columns.items() if row.values.get(column)}
