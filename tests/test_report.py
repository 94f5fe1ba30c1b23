"""Reports: what a reader sees must be there, escaped, self-contained, and drawn where the mask is."""

import html.parser
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from factory import report
from factory.report.figures import figure_svg
from factory.report.sheets import PALETTE


def disc(size: int, centre: tuple[int, int], radius: int, label: int = 1) -> np.ndarray:
    y, x = np.mgrid[:size, :size]
    return np.where((y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2, label, 0).astype(np.uint8)


def test_contour_is_the_boundary_of_the_mask_and_leaves_the_rest_untouched() -> None:
    image = np.full((64, 64), 90, np.uint8)
    mask = disc(64, (20, 40), 9)
    drawn = report.draw_mask(image, mask)
    coloured = np.any(drawn != 90, axis=2)
    assert np.all(mask[coloured] == 1)
    distance = np.hypot(*(np.argwhere(coloured) - [20, 40]).T)
    assert distance.min() > 7 and distance.max() <= 9.5
    assert np.all(drawn[20, 40] == 90), "the inside stays visible"
    assert set(map(tuple, drawn[coloured])) == {PALETTE[0]}


def test_each_label_has_its_own_colour_and_a_frame_filling_mask_no_border_line() -> None:
    mask = disc(64, (16, 16), 8) + disc(64, (48, 48), 8, label=3)
    drawn = report.draw_mask(np.zeros((64, 64), np.uint8), mask)
    assert {tuple(c) for c in drawn.reshape(-1, 3)} == {(0, 0, 0), PALETTE[0], PALETTE[2]}
    full = report.draw_mask(np.zeros((32, 32), np.uint8), np.ones((32, 32), np.uint8))
    assert not full.any()


def test_contact_sheet_places_every_image_and_takes_mixed_sizes() -> None:
    images = [np.full((20, 40), 50 * (i + 1), np.uint8) for i in range(3)]
    images.append(np.full((30, 30, 3), (255, 0, 0), np.uint8))
    sheet = report.contact_sheet(images, [None] * 4, [f"c{i}\nline" for i in range(4)], columns=2, cell=32)
    pixels = np.asarray(sheet)
    assert sheet.width == 2 * 38 + 6
    assert [tuple(pixels[6 + 16, 6 + 16]), tuple(pixels[6 + 16, 44 + 16])] == [(50,) * 3, (100,) * 3]
    second = (sheet.height - 6) // 2 + 6
    assert tuple(pixels[second + 16, 6 + 16]) == (150, 150, 150)
    assert tuple(pixels[second + 16, 44 + 16]) == (255, 0, 0)


def test_captions_are_drawn_and_cut_to_the_cell() -> None:
    image = np.zeros((32, 32), np.uint8)
    plain = np.asarray(report.contact_sheet([image, image], None, ["a", ""], cell=32))
    long = np.asarray(report.contact_sheet([image, image], None, ["a very long caption indeed", ""], cell=32))
    changed = np.argwhere(np.any(plain != long, axis=2))
    assert len(changed) and changed[:, 1].max() < 6 + 32 + 2, "text must not run into the next cell"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": []}, "at least one"),
        ({"images": [np.zeros((4, 4), np.uint8)], "masks": []}, "masks: 0 given for 1"),
        ({"images": [np.zeros((4, 4), np.uint8)], "captions": ["a", "b"]}, "captions: 2 given for 1"),
        ({"images": [np.zeros((4, 4), np.uint8)], "columns": 0}, "columns 0"),
    ],
)
def test_bad_sheets_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        report.contact_sheet(**arguments)


class Reader(html.parser.HTMLParser):
    """Collects text, tags and every address the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "data")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def page(folder: Path) -> tuple[str, Reader]:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (48, 64), np.uint8) for _ in range(3)]
    masks = [disc(64, (20, 30), 9)[:48], None, np.zeros((48, 64), np.uint8)]
    sections: list[report.Section] = [
        report.Cards(title="Summary", cards=[report.Card(label="accepted", value="101", tone="good")]),
        report.Gallery(title="Real", images=images, masks=masks, captions=["<script>x</script>", "b", "c"]),
        report.Gallery(title="Nothing", images=[]),
        report.Bars(title="Reasons", counts={"blank_image": 3}, total=12, tone="bad"),
        report.Plot(
            title="Loss", figure=report.loss_curve(list(range(50)), [1 / (i + 1) for i in range(50)])
        ),
        report.Pairs(
            title="Pairs",
            pairs=[
                report.Pair(
                    synthetic=images[0],
                    real=images[1],
                    synthetic_mask=masks[0],
                    synthetic_caption="s",
                    real_caption="r",
                    similarity=0.987,
                )
            ],
        ),
        report.Plot(
            title="Hist", figure=report.similarity_histogram(rng.normal(size=20), rng.normal(size=20))
        ),
        report.Timings(title="Time", stages=[report.StageTime(name="train", seconds=10.0, fixed=2.5)]),
        report.Grid(title="Counts", header=("class", "n"), rows=[("benign", 3)]),
        report.Facts(title="Provenance", facts={"recipe": "tiny"}),
        report.Commands(title="Next", commands={"look": 'factory query t "a < 3 AND b"'}),
    ]
    path = report.html_report(folder / "report.html", sections, title="A & B", subtitle="<i>", footer="end")
    text = path.read_text()
    reader = Reader()
    reader.feed(text)
    return text, reader


def test_the_page_holds_everything_and_loads_nothing(tmp_path: Path) -> None:
    text, reader = page(tmp_path)
    assert "script" not in reader.tags and "link" not in reader.tags and "i" not in reader.tags
    assert all(a.startswith(("data:image/png;base64,", "#")) for a in reader.addresses)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    seen = " ".join(reader.text)
    for expected in ("A & B", "101", "<script>x</script>", "blank_image", "25.0%", "cosine", "0.987"):
        assert expected in seen
    for expected in ("10.0 s", "2.5 s", "benign", "tiny", 'factory query t "a < 3 AND b"', "none", "end"):
        assert expected in seen
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_images_are_kept_lossless_with_their_contour(tmp_path: Path) -> None:
    import base64
    import io

    text, _ = page(tmp_path)
    first = np.random.default_rng(0).integers(0, 255, (48, 64), np.uint8)
    data = re.search(r"base64,([^\"]+)", text)
    assert data is not None
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data.group(1))))), first)
    assert text.count('<path class="m1"') == 2, "one mask in the gallery, one in the pair"
    assert 'viewBox="0 0 64 48"' in text
    path = re.search(r'class="m1" d="M([^"]+)Z"', text)
    assert path is not None
    points = np.array([[float(v) for v in p.split()] for p in path.group(1).split("L")])
    radius = np.hypot(points[:, 0] - 30.5, points[:, 1] - 20.5)
    assert radius.min() > 8 and radius.max() < 10.5, "contour in the image's own coordinates"


def test_figures_follow_the_colours_of_the_page() -> None:
    svg = figure_svg(report.loss_curve([1, 2, 3], [3.0, 2.0, 1.0]), "loss")
    assert svg.startswith("<svg") and "var(--ink)" in svg and "var(--accent)" in svg
    assert "#2463c9" not in svg and ">step<" in svg


def test_the_same_figure_is_the_same_svg() -> None:
    first, second = (figure_svg(report.loss_curve([1, 2], [2.0, 1.0]), "loss") for _ in range(2))
    assert first == second


def test_a_loss_curve_needs_as_many_steps_as_losses() -> None:
    with pytest.raises(ValueError, match="2 given for 1 steps"):
        report.loss_curve([1], [1.0, 2.0])


def test_both_sides_of_a_histogram_carry_the_names_given() -> None:
    near, far = np.linspace(0.8, 0.9, 20), np.linspace(0.1, 0.2, 10)
    axes = report.similarity_histogram(near, far, names=("near", "far"), ylabel="share").axes[0]
    legend = axes.get_legend()
    assert legend is not None and axes.get_ylabel() == "share"
    assert [text.get_text() for text in legend.get_texts()] == ["far (10)", "near (20)"]
    # Each name stands at its own bars: those of "near" hold their share above 0.5.
    for bars in axes.containers:
        above = sum(bar.get_height() for bar in bars if bar.get_x() + bar.get_width() / 2 > 0.5)
        assert above == pytest.approx(1.0 if bars[0].get_label().startswith("near") else 0.0)
    assert len(axes.containers) == 2
