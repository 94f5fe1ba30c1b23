"""Explore how synthetic data are best used: at which ratio, or with which class-adaptive sampler.

    factory explore ratio --real real.lance --synthetic synthetic.lance --task classification --out runs/ratio
    factory explore sampler --real real.lance --synthetic synthetic.lance --out runs/sampler

`factory explore ratio --help` and `factory explore sampler --help` say all about each. Neither reads the test split.
"""

import importlib
from collections.abc import Sequence

_MODULES = {"ratio": "tune.explore_ratio", "sampler": "tune.explore_sampler"}


def command(argv: Sequence[str]) -> int:
    """`factory explore ratio|sampler`: exit status of the one asked for.

    Raises:
        ValueError: neither is named.
    """
    words = list(argv)
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if words else 2
    if words[0] not in _MODULES:
        raise ValueError(f"explore {words[0]!r}: there are {' and '.join(_MODULES)}")
    return int(importlib.import_module(_MODULES[words[0]]).command(words[1:]))
