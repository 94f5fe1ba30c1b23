"""What the papers' tables are filled from: one line per arm and evaluation set, and a table that knows what is missing."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from factory.report.page import Commands, Grid, Section

Record = Mapping[str, Any]
PERCENT = ("dice", "iou", "accuracy", "macro_f1", "macro_precision", "macro_recall", "many_shot_accuracy",
           "medium_shot_accuracy", "few_shot_accuracy")  # fmt: skip
"""Metrics that the papers print in percent."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One arm on one set of evaluation rows.

    Attributes:
        dataset, task, model: of the comparison.
        loss: of the arm: the comparison's, or that of the arm's own method.
        is_resampled: whether classes were drawn equally often.
        place: "test", or the name of an external table.
        arm: its name; kind: its first word.
        ratio: added rows per real row; None where it is no single number.
        only: without real rows.
        recipes: of the synthetic tables, with what was overridden.
        num_train: real training images.
        num_backgrounds: different real backgrounds behind the synthetic rows; 0 where there are none.
        synthetic: addresses of the synthetic tables.
        values: metric → (value, low, high); low and high may be None.
        is_different: whether the corrected p-value against real data only is below 5 %.
    """

    dataset: str
    task: str
    model: str
    loss: str
    is_resampled: bool
    place: str
    arm: str
    kind: str
    ratio: float | None
    only: bool
    recipes: tuple[str, ...]
    num_train: int
    num_backgrounds: int
    synthetic: tuple[str, ...]
    values: Mapping[str, tuple[float, float | None, float | None]]
    is_different: bool


def lines_of(record: Record) -> Iterator[Line]:
    """Every arm and evaluation set of a result of `factory evaluate downstream`."""
    sources = record["synthetic"]
    plans = [plan for source in sources for plan in source["plans"]]
    recipes = tuple(sorted({" ".join([plan["recipe"], *plan["overrides"]]) for plan in plans}))
    for part in record["evaluations"]:
        table = part["comparison"]
        for arm in table["arms"]:
            name = arm["name"]
            method = record.get("methods", {}).get(name)
            data = name.removesuffix(f", {method}")
            kind, _, rest = data.partition(" ")
            number = re.fullmatch(r"(?:only )?([\d.e+-]+)×", rest)
            value = arm["value"]
            values: dict[str, tuple[float, float | None, float | None]] = {
                metric: (found, None, None) for metric, found in arm["other"].items() if found is not None
            }
            for metric, found in part["intervals"].get(name, {}).items():
                values[metric] = (found["value"], found["low"], found["high"])
            values[table["metric"]] = (value["value"], value["low"], value["high"])
            yield Line(
                dataset=record["dataset"] or record["real"]["uri"],
                task=record["task"],
                model=record["model"],
                loss={None: record["loss"], "resampling": "cross_entropy"}.get(method, method),
                is_resampled=kind == "class_balanced" or method == "resampling",
                place=part["name"],
                arm=name,
                kind=kind,
                ratio=float(number[1]) if number else None,
                only=rest.startswith("only"),
                recipes=recipes,
                num_train=sum(record["train_counts"]),
                num_backgrounds=max((source["backgrounds"] for source in sources), default=0),
                synthetic=tuple(source["uri"] for source in sources),
                values=values,
                is_different=arm["adjusted_p"] is not None and arm["adjusted_p"] < 0.05,
            )


@dataclass(kw_only=True)
class PaperTable:
    """A table as it is being filled.

    Attributes:
        title: paper, number and what it shows.
        note: how it differs from the paper's.
        header, rows: cells are text.
        missing: command → its mark, of the cells that were not run.
    """

    title: str
    note: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def not_run(self, command: str) -> str:
        """The text of a cell that needs this command."""
        return f"not run: {self.missing.setdefault(command, f'[{len(self.missing) + 1}]')}"

    def sections(self) -> list[Section]:
        """The table, and what to run for the cells that were not run."""
        found: list[Section] = [Grid(title=self.title, note=self.note, header=self.header, rows=self.rows)]
        if self.missing:
            commands = {mark: command for command, mark in self.missing.items()}
            found.append(Commands(title=f"{self.title}: not run", commands=commands))
        return found


def told(line: Line | None, metric: str) -> str | None:
    """A metric with its interval, in percent where the papers do; a star where it differs from real data only."""
    if line is None:
        return None
    if metric not in line.values:
        return "not defined on these rows"
    scale, digits = (100, 1) if metric in PERCENT else (1, 3)
    value, low, high = line.values[metric]
    star = "*" if line.is_different and metric in ("auc", "dice") else ""
    text = f"{scale * value:.{digits}f}{star}"
    return (
        text
        if low is None or high is None
        else f"{text} [{scale * low:.{digits}f}, {scale * high:.{digits}f}]"
    )


class Results:
    """The results that a report is made of, and the tables they fill."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.images = [r for r in records if r["kind"] == "images"]
        self.lines = [line for r in records if r["kind"] == "downstream" for line in lines_of(r)]
        self.has_sampler = any(r["kind"] == "sampler" for r in records)
        downstream = [r for r in records if r["kind"] == "downstream"]
        self.real = next((r["real"]["uri"] for r in [*downstream, *self.images]), "REAL")
        sources = [r["synthetic"][0]["uri"] for r in downstream] + [
            r["synthetic"]["uri"] for r in self.images
        ]
        self.synthetic = next(iter(sources), "SYNTHETIC")

    def find(self, **want: Any) -> Line | None:
        """The first line whose attributes are these; a function is a test of the attribute."""
        return next((line for line in self.lines if _fits(line, want)), None)

    def groups(self, task: str, *names: str) -> list[tuple[Any, ...]]:
        """Distinct values of these attributes among the lines of a task, in the order given."""
        return list(
            dict.fromkeys(tuple(getattr(line, n) for n in names) for line in self.lines if line.task == task)
        )

    def downstream(
        self, task: str, options: str, real: str | None = None, synthetic: str | None = None
    ) -> str:
        """A command of `factory evaluate downstream`; what follows "#" in the options is a remark."""
        options, _, remark = options.partition("#")
        return (
            f"factory evaluate downstream --real {real or self.real} --synthetic {synthetic or self.synthetic} "
            f"--task {task} {options.strip()} --out FOLDER" + (f"  # {remark.strip()}" if remark else "")
        )

    def image_score(self, record: Record, metric: str) -> str | None:
        """A distance over all images of a result of `factory evaluate images`, Inception features first."""
        found = [
            s
            for s in record["scores"]
            if s["metric"] == metric and s["label"] in ("all",) and s["value"] is not None
        ]
        found.sort(key=lambda s: not s["features"].startswith("inception"))
        return None if not found else _distance(found[0])

    def image_mean(self, record: Record, metric: str) -> str | None:
        """A measure of diversity, averaged over classes."""
        found = [s for s in record["scores"] if s["metric"] == metric and s["value"] is not None]
        if not found:
            return None
        mean, real = (sum(s[k] for s in found) / len(found) for k in ("value", "floor"))
        return f"{mean:.3f} (real {real:.3f})"

    def fid_of(self, line: Line) -> str | None:
        """FID of the synthetic table behind an arm."""
        for record in self.images:
            if record["synthetic"]["uri"] in line.synthetic:
                return self.image_score(record, "fid")
        return None

    def images_command(self, options: str = "") -> str:
        return f"factory evaluate images {self.synthetic} --real {self.real} {options}--out FOLDER"


def _fits(line: Line, want: Mapping[str, Any]) -> bool:
    for name, value in want.items():
        own = getattr(line, name)
        if not (value(own) if callable(value) else own == value):
            return False
    return True


def _distance(score: Mapping[str, Any]) -> str:
    return f"{score['value']:.4g} [{score['low']:.4g}, {score['high']:.4g}] ({score['features']}, floor {score['floor']:.4g})"
