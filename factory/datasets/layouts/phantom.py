"""Procedural ultrasound as a dataset: `factory.datasets.phantom`, made on the fly."""

from functools import partial
from pathlib import Path

from factory.datasets.layout import Item, Layout, Listing, ListingOptions, Pixels
from factory.datasets.phantom import PhantomConfig, phantom_class, phantom_sample
from schemas.identity import fingerprint

DEFAULT_NUM_IMAGES = 256


def phantom_listing(
    num_images: int = DEFAULT_NUM_IMAGES, seed: int = 0, config: PhantomConfig | None = None
) -> Listing:
    """Items of the first `num_images` of a phantom population; every image is a patient.

    Raises:
        ValueError: `num_images` is below 1.
    """
    config = config or PhantomConfig()
    if num_images < 1:
        raise ValueError(f"--num-images {num_images}: want at least 1")
    items = []
    for index in range(num_images):
        prior = phantom_class(config, seed, index)
        items.append(
            Item(source_path=f"phantom/{seed}/{index}", label_name=prior.name, has_lesion=prior.lesion,
                 make=partial(_pixels, config, seed, index), patient_id=f"phantom-{seed}-{index}",
                 device=config.scanner.name, pixel_spacing=config.scanner.depth / config.size)
        )  # fmt: skip
    settings = {"num_images": str(num_images), "seed": str(seed), "config": fingerprint(config)}
    return Listing(items=items, class_names=config.class_names, settings=settings)


def _pixels(config: PhantomConfig, seed: int, index: int) -> Pixels:
    sample = phantom_sample(config, seed, index)
    return Pixels(sample.image, sample.mask, sample.attributes)


def _listing(path: Path, options: ListingOptions) -> Listing:
    count = DEFAULT_NUM_IMAGES if options.num_images is None else options.num_images
    return phantom_listing(count, options.seed)


PHANTOM = Layout(
    name="phantom",
    about="procedural B-mode ultrasound, benign / malignant, with masks; needs no PATH",
    listing=_listing,
    licence="Apache-2.0",
    allowed_use="any",
    citation="procedural phantom of synthetic-data-factory",
    unit="patient level",
    is_made=True,
    contents="procedural ultrasound; any number; benign, malignant; masks",
    obtain="made by `factory prepare phantom`",
    tree="no files\n",
)
