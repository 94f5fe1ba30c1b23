"""Public dataset layouts, one file each. A new one is a file with a `Layout` and a line in `LAYOUTS`."""

import difflib

from factory.datasets.layout import Layout
from factory.datasets.layouts.breast_lesions_usg import BREAST
from factory.datasets.layouts.bus_bra import BUS_BRA
from factory.datasets.layouts.bus_uclm import BUS_UCLM
from factory.datasets.layouts.busi import BUSI
from factory.datasets.layouts.ddti import DDTI
from factory.datasets.layouts.folder import FOLDER
from factory.datasets.layouts.ham10000 import HAM10000
from factory.datasets.layouts.isic import ISIC_2017, ISIC_2018_TASK1, ISIC_2018_TASK3
from factory.datasets.layouts.medmnist import MEDMNIST
from factory.datasets.layouts.ph2 import PH2
from factory.datasets.layouts.phantom import PHANTOM
from factory.datasets.layouts.qamebi import QAMEBI
from factory.datasets.layouts.stu import STU
from factory.datasets.layouts.udiat import UDIAT

_ULTRASOUND = (BUSI, MEDMNIST, STU, UDIAT, BREAST, BUS_UCLM, BUS_BRA, QAMEBI, DDTI)
_DERMOSCOPY = (ISIC_2017, ISIC_2018_TASK1, ISIC_2018_TASK3, HAM10000, PH2)
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (*_ULTRASOUND, *_DERMOSCOPY, FOLDER, PHANTOM)}


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
