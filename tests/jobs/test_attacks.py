"""What a stranger's file may not do; docs/security.md lists these and where the others are tested."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from factory.imaging import decode_png, encode_png
from jobs import prepare, query, reproduce

POSTSCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n(x) (w) file\nshowpage\n%%EOF\n"
)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side: int) -> bytes:
    """A PNG of side × side black pixels in a few kilobytes."""
    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(bytes(side + 1)) for _ in range(side)) + rows.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def image_folder(root: Path, **files: bytes) -> Path:
    """An `images/` folder of two classes with one sound image each, and further files beside these."""
    for name in ("benign", "malignant"):
        (root / "images" / name).mkdir(parents=True)
        pixels = np.random.default_rng(len(name)).integers(0, 255, (64, 64), np.uint8)
        (root / "images" / name / "sound.png").write_bytes(encode_png(pixels))
    for name, data in files.items():
        (root / "images" / "benign" / f"{name}.png").write_bytes(data)
    return root


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (POSTSCRIPT, "none of PNG, JPEG, BMP, TIFF"),
        (b"GIF89a" + bytes(64), "none of PNG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><script>x</script></svg>", "none of PNG"),
        (bomb(14_000), "decompression bomb"),
    ],
    ids=["PostScript", "GIF", "SVG", "bomb"],
)
def test_a_file_that_is_no_image_is_named_and_not_decoded(tmp_path: Path, data: bytes, message: str) -> None:
    folder = image_folder(tmp_path / "source", evil=data)
    args = prepare.Args(layout="folder", path=str(folder), out=str(tmp_path / "real.lance"))
    with pytest.raises(ValueError, match=r"benign/evil\.png") as raised:
        prepare.run(args)
    assert message in str(raised.value)
    assert not (tmp_path / "real.lance").exists()


def test_a_search_image_is_not_handed_to_an_interpreter(real_table: str, tmp_path: Path) -> None:
    (tmp_path / "like.png").write_bytes(POSTSCRIPT)
    args = query.Args(table=real_table, like=str(tmp_path / "like.png"))
    with pytest.raises(ValueError, match="not an image file"):
        query.run(args)


def test_pixels_of_a_table_are_png_and_nothing_else() -> None:
    with pytest.raises(OSError):
        decode_png(POSTSCRIPT)


def test_a_table_does_not_choose_the_code_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs.py").write_text("raise SystemExit('code named by a table ran')")
    monkeypatch.chdir(tmp_path)
    args = reproduce.Args(table="x.lance", request_id="0f")
    record = {"recipe": "theirs:main", "overrides": []}
    with pytest.raises(ValueError, match="if you trust it, add --recipe theirs:main"):
        reproduce.recorded_recipe(args, record)
    trusted = reproduce.Args(table="x.lance", request_id="0f", recipe="theirs:main")
    with pytest.raises(SystemExit, match="ran"):
        reproduce.recorded_recipe(trusted, record)
    assert reproduce.recorded_recipe(args, {"recipe": "tiny", "overrides": []}).name == "tiny"
