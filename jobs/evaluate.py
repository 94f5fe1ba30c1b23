"""How good synthetic images are: beside real ones, in a downstream task, and as one report.

    factory evaluate images synthetic.lance --real real.lance --out runs/images
    factory evaluate downstream --real real.lance --synthetic synthetic.lance --ratio 1 --model small_cnn --out runs/downstream
    factory evaluate report runs/images runs/downstream --out runs/report

`factory evaluate WORD --help` says all about one of them.
"""

import importlib
from collections.abc import Sequence

WORDS = {
    "images": "jobs.evaluate_images",
    "downstream": "jobs.evaluate_downstream",
    "report": "jobs.evaluate_report",
}


def command(argv: Sequence[str]) -> int:
    """`factory evaluate`."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: factory evaluate {{{','.join(WORDS)}}} [options]\n\n{__doc__}")
        return 0 if argv else 2
    if argv[0] not in WORDS:
        raise ValueError(f"factory evaluate {argv[0]!r}: want one of {', '.join(WORDS)}")
    return int(importlib.import_module(WORDS[argv[0]]).command(list(argv[1:])))
