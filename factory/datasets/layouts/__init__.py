"""Public dataset layouts, one file each. A new one is a file with a `Layout` and a line in `LAYOUTS`."""

import difflib

from factory.datasets.layout import Layout
from factory.datasets.layouts.busi import BUSI
from factory.datasets.layouts.folder import FOLDER
from factory.datasets.layouts.medmnist import MEDMNIST
from factory.datasets.layouts.phantom import PHANTOM
from factory.datasets.layouts.stu import STU

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (BUSI, MEDMNIST, STU, FOLDER, PHANTOM)}


def get_layout(name: str) -> Layout:
    """The layout called `name`.

    Raises:
        ValueError: there is none; names those that exist and the nearest.
    """
    if name in LAYOUTS:
        return LAYOUTS[name]
    near = difflib.get_close_matches(name, LAYOUTS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"layout {name!r} is none of {', '.join(LAYOUTS)}{hint}")
