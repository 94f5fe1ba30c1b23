import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_fixtures import write_xlsx

from factory.datasets.layout import Problem
from factory.datasets.layouts.tables import is_plain_name, keyed_rows, parse_xml, read_table


def test_xlsx_cells_are_text_and_gaps_are_empty(tmp_path: Path) -> None:
    path = write_xlsx(
        tmp_path / "t.xlsx",
        [["Title"], [None], ["Name ", "a\nb", "C"], ["x & y", None, 2.5], [None], [7, 1e300]],
    )
    rows = read_table(path, ("name", "A B"))
    assert [row.where for row in rows] == ["t.xlsx row 4", "t.xlsx row 6"]
    assert dict(rows[0].values) == {"name": "x & y", "A B": "", "C": "2.5"}
    assert (
        rows[1].values["name"] == "7" and float(rows[1].values["A B"]) == 1e300 and rows[1].values["C"] == ""
    )


_TEXT = st.text(
    st.characters(min_codepoint=32, max_codepoint=0x2FF, exclude_characters="\x7f\x85\xa0"), max_size=8
)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(st.one_of(st.none(), _TEXT, st.integers(-999, 999)), min_size=3, max_size=3), max_size=6
    )
)
def test_xlsx_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str | int | None]]
) -> None:
    path = write_xlsx(tmp_path_factory.mktemp("x") / "t.xlsx", [["p", "q", "r"], *rows])
    texts = [["" if cell is None else str(cell).strip() for cell in row] for row in rows]
    found = [[row.values[name] for name in "pqr"] for row in read_table(path, ("p", "q", "r"))]
    assert found == [row for row in texts if any(row)]


def test_a_file_that_is_no_xlsx_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_text("Image,Type")
    with pytest.raises(ValueError, match=r"a\.xlsx: not a readable XLSX file"):
        read_table(tmp_path / "a.xlsx", ("Image",))
    good = write_xlsx(tmp_path / "b.xlsx", [["Image"], ["x"]])
    with zipfile.ZipFile(good) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    for name, content in (("xl/workbook.xml", b"<workbook/>"), ("xl/sharedStrings.xml", b"<sst/>"),
                          ("xl/worksheets/clinical.xml", b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>')):  # fmt: skip
        with zipfile.ZipFile(tmp_path / "c.xlsx", "w") as archive:
            for part, value in (parts | {name: content}).items():
                archive.writestr(part, value)
        with pytest.raises(ValueError, match=r"c\.xlsx: not a readable XLSX file"):
            read_table(tmp_path / "c.xlsx", ("Image",))


def test_an_xlsx_that_unpacks_to_very_much_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.xlsx"
    write_xlsx(path, [["Image"]])
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts["xl/worksheets/clinical.xml"] = b" " * (65 << 20)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for part, value in parts.items():
            archive.writestr(part, value)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(ValueError, match="65 MiB, more than 64"):
        read_table(path, ("Image",))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_xml_with_entities_is_refused(encoding: str) -> None:
    with pytest.raises(ValueError, match=r"1\.xml: XML with a document type"):
        parse_xml('<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'.encode(encoding), "1.xml")
    with pytest.raises(ValueError, match=r"1\.xml: not readable XML"):
        parse_xml(b"<case>", "1.xml")


def test_keys_are_there_once_and_stay_in_their_folder(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("\ufeffimage,x\na,1\n,2\na,3\n../b,4\n\nc\n", encoding="utf-8")
    problems: list[Problem] = []
    keyed = keyed_rows(read_table(tmp_path / "t.csv", ("image",)), "image", problems)
    assert {key: dict(row.values) for key, row in keyed.items()} == {"a": {"image": "a", "x": "1"},
                                                                     "c": {"image": "c", "x": ""}}  # fmt: skip
    assert [str(problem).partition(";")[0] for problem in problems] == [
        "t.csv row 3: no image", "t.csv row 4: a second row for a (the first: t.csv row 2)",
        "t.csv row 5: image '../b' is no plain file name",
    ]  # fmt: skip
    assert not any(map(is_plain_name, ("", "..", "a/b", "a\\b", "C:x", "a\0")))
