"""MedMNIST archives (npz): `{train,val,test}_images`, `_labels`. No masks.

The official split is kept as an attribute only: in BreastMNIST near-duplicates lie on both sides of it, so
`prepare` splits anew by group. Label 0 of BreastMNIST is *malignant*.
"""

import zipfile
from functools import partial
from pathlib import Path

import numpy as np

from factory.datasets.layout import Item, Layout, Listing, ListingOptions, Pixels

_CLASS_NAMES = {"breastmnist": ("malignant", "normal_or_benign"), "pneumoniamnist": ("normal", "pneumonia")}
"""In label order, as in the MedMNIST table of contents; other archives get class_0, class_1, …"""
_SPLITS = ("train", "val", "test")


def _listing(path: Path, options: ListingOptions) -> Listing:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a MedMNIST archive such as breastmnist.npz")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a readable npz archive ({error}); download it again") from error
    missing = [f"{s}_{k}" for s in _SPLITS for k in ("images", "labels") if f"{s}_{k}" not in arrays]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}; is it a MedMNIST archive?")
    labels = {split: arrays[f"{split}_labels"].reshape(-1) for split in _SPLITS}
    for split in _SPLITS:
        if arrays[f"{split}_labels"].size != len(arrays[f"{split}_images"]):
            raise ValueError(
                f"{path}: {split}_labels is not one label per image (multi-label is not supported)"
            )
    count = 1 + max(int(values.max(initial=0)) for values in labels.values())
    names = _CLASS_NAMES.get(path.stem.split("_")[0], tuple(f"class_{index}" for index in range(count)))
    items = [
        Item(source_path=f"{path.name}/{split}/{index}", label_name=names[int(labels[split][index])],
             make=partial(_pixels, image), masks=None, attributes={"official_split": split})
        for split in _SPLITS
        for index, image in enumerate(arrays[f"{split}_images"])
    ]  # fmt: skip
    return Listing(items=items, class_names=names)


def _pixels(image: np.ndarray) -> Pixels:
    return Pixels(image, None)


MEDMNIST = Layout(
    name="medmnist",
    about="a MedMNIST .npz archive (BreastMNIST: label 0 = malignant); no masks",
    listing=_listing,
    licence="CC BY 4.0 (most MedMNIST sets; DermaMNIST is CC BY-NC 4.0)",
    allowed_use="research with attribution; not for clinical use",
    citation="Yang, Shi, Wei, Liu, Zhao, Ke, Pfister, Ni. MedMNIST v2. Scientific Data 10 (2023) 41; and the source set",
    contents="28 px archives; BreastMNIST: 780 images; malignant, normal or benign; no masks",
    obtain="Zenodo, MedMNIST v2 (breastmnist.npz and others)",
    tree="breastmnist.npz    arrays train_images, train_labels, val_…, test_…\n",
)
