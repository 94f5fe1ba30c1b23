"""Reports: contact sheets, figures, and self-contained HTML pages."""

from factory.report.figures import loss_curve, similarity_histogram
from factory.report.page import (
    Bars,
    Card,
    Cards,
    Commands,
    Facts,
    Gallery,
    Grid,
    Pair,
    Pairs,
    Plot,
    Section,
    StageTime,
    Timings,
    html_report,
)
from factory.report.sheets import contact_sheet, draw_mask

__all__ = [
    "Bars",
    "Card",
    "Cards",
    "Commands",
    "Facts",
    "Gallery",
    "Grid",
    "Pair",
    "Pairs",
    "Plot",
    "Section",
    "StageTime",
    "Timings",
    "contact_sheet",
    "draw_mask",
    "html_report",
    "loss_curve",
    "similarity_histogram",
]
