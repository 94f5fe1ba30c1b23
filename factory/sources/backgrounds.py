"""Sources of backgrounds: real images into which lesions are painted. Rows made on them are `derived`.

A background brings its patient along: its group, its split (training) and its licence are those of the row that is
made on it, and no claim of privacy holds for its pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from factory.imaging import TrainingRow, as_grey, decode_png, encode_png
from factory.sources.rows import rows_digest
from schemas.identity import execution_field, hash_parts
from schemas.request import SynthesisRequest

_TISSUE_LEVEL = 6.0
_TISSUE_WINDOW = 1 / 16
_HEAL = (
    "`factory heal --recipe meddiff_ft --generator RUN --real REAL --out HEALED` makes one, RUN being trained with "
    "objectives.MaskedDenoising.region background; then give --backgrounds.table HEALED"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class BackgroundDraw:
    """A background and where it comes from.

    Attributes:
        image: uint8 (S, S) or (S, S, 3).
        background_id: image_id of the real image.
        group_id: its patient and near-duplicate group.
        licence: of its source; None where that is the table's.
        parameters: what was drawn, for provenance.
    """

    image: np.ndarray = field(repr=False)
    background_id: str
    group_id: str
    licence: str | None
    parameters: Mapping[str, float | int | str]


@dataclass(frozen=True, kw_only=True, eq=False)
class Background:
    """One image that may be drawn; `tissue` is packed bits of where it shows tissue, (S, S)."""

    image_id: str
    group_id: str
    licence: str | None
    png: bytes = field(repr=False)
    tissue: np.ndarray = field(repr=False)

    @classmethod
    def of(cls, image_id: str, group_id: str, licence: str | None, image: np.ndarray) -> "Background":
        """The background of an image, uint8 (S, S[, 3])."""
        return cls(
            image_id=image_id,
            group_id=group_id,
            licence=licence,
            png=encode_png(image),
            tissue=np.packbits(tissue_of(image)),
        )


@dataclass(frozen=True, kw_only=True)
class RealNormals:
    """Training images without a lesion (an empty mask: the class "normal"), one drawn per request.

    Xie et al. 2025 use 50 backgrounds "included in the dataset", which is true of datasets with normal images.

    Attributes:
        feather: width of the seam around the mask, as a fraction of the side.
        min_tissue: share of the requested mask under which the background must show tissue rather than the black
            margin; 0 takes any background.
    """

    feather: float = 0.01
    min_tissue: float = 0.9

    def __post_init__(self) -> None:
        _check("RealNormals", self.feather, self.min_tissue)

    def fit(self, rows: Sequence[TrainingRow]) -> "FittedBackgrounds":
        """The rows with an empty mask.

        Raises:
            ValueError: there is none.
        """
        normals = [row for row in rows if row.mask is not None and not row.mask.any()]
        if not normals:
            raise ValueError(
                f"backgrounds.RealNormals: none of the {len(rows)} training rows has an empty mask (no image without "
                f"a lesion); use backgrounds:healed-lesions: {_HEAL}"
            )
        found = [Background.of(row.image_id, row.group_id, row.licence or None, row.image) for row in normals]
        return FittedBackgrounds.of("real_normals", self.min_tissue, found, rows)


@dataclass(frozen=True, kw_only=True)
class HealedLesions:
    """Training images whose lesion was painted over by a generator of healthy tissue (Xie et al. 2025, §2.1).

    Attributes:
        table: made by `factory heal`; its content, not its place, enters the identity of images.
        feather: width of the seam around the mask, as a fraction of the side.
        min_tissue: as in `RealNormals`.
    """

    table: str = execution_field("")
    feather: float = 0.01
    min_tissue: float = 0.9

    def __post_init__(self) -> None:
        _check("HealedLesions", self.feather, self.min_tissue)

    def weights(self) -> dict[str, str]:
        """Digest of the healed table: of its image ids, pixels and healed regions.

        Raises:
            FileNotFoundError: there is none; says which command makes it.
        """
        rows = sorted(self._read(), key=lambda row: row["image_id"])
        parts = (row[name] for row in rows for name in ("image_id", "image", "healed_mask"))
        return {"backgrounds": hash_parts("healed", *parts)}

    def fit(self, rows: Sequence[TrainingRow]) -> "FittedBackgrounds":
        """The healed images of the training rows.

        Raises:
            FileNotFoundError: no table.
            ValueError: it is empty, of images that are none of `rows`, or of another size.
        """
        known = {row.image_id: row for row in rows}
        found = []
        for row in self._read():
            image = decode_png(row["image"])
            original = known.get(row["image_id"])
            if original is None:
                raise ValueError(
                    f"backgrounds.HealedLesions.table={self.table}: image_id {row['image_id']} is no training row of "
                    "the real table; heal the table that synthesis uses"
                )
            if image.shape[:2] != original.image.shape[:2]:
                raise ValueError(
                    f"backgrounds.HealedLesions.table={self.table}: healed at {image.shape[0]} px, but the generator "
                    f"works at {original.image.shape[0]} px; heal again at that resolution"
                )
            found.append(Background.of(row["image_id"], row["group_id"], row["licence"], image))
        if not found:
            raise ValueError(f"backgrounds.HealedLesions.table={self.table} has no rows; {_HEAL}")
        return FittedBackgrounds.of("healed_lesions", self.min_tissue, found, rows)

    def _read(self) -> list[dict]:
        from factory.storage import open_table

        if not self.table:
            raise FileNotFoundError(f"backgrounds.HealedLesions.table: no healed table is given; {_HEAL}")
        try:
            table = open_table(self.table)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"backgrounds.HealedLesions.table={self.table}: there is no such table; {_HEAL}"
            ) from error
        columns = ["image_id", "group_id", "licence", "image", "healed_mask"]
        missing = [name for name in columns if name not in table.schema.names]
        if missing:
            raise ValueError(
                f"backgrounds.HealedLesions.table={self.table}: column {missing[0]} is missing, so it is no healed "
                f"table; {_HEAL}"
            )
        return table.read(columns).to_pylist()


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedBackgrounds:
    """Backgrounds to draw from, ordered by image_id."""

    kind: str
    min_tissue: float
    backgrounds: tuple[Background, ...] = field(repr=False)
    fitted_on: str

    @classmethod
    def of(
        cls, kind: str, min_tissue: float, found: Sequence[Background], rows: Sequence[TrainingRow]
    ) -> "FittedBackgrounds":
        ordered = tuple(sorted(found, key=lambda item: item.image_id))
        return cls(kind=kind, min_tissue=min_tissue, backgrounds=ordered, fitted_on=rows_digest(rows))

    def draw(self, request: SynthesisRequest, rng: np.random.Generator, mask: np.ndarray) -> BackgroundDraw:
        """The first background, in random order, that shows enough tissue under `mask`, (S, S).

        Raises:
            ValueError: none does, or the mask is of another size.
        """
        best = 0.0
        for position in rng.permutation(len(self.backgrounds)):
            item = self.backgrounds[position]
            share = _share_of_tissue(item.tissue, mask)
            best = max(best, share)
            if share >= self.min_tissue:
                return BackgroundDraw(
                    image=decode_png(item.png),
                    background_id=item.image_id,
                    group_id=item.group_id,
                    licence=item.licence,
                    parameters={"background_source": self.kind, "tissue": round(share, 4)},
                )
        raise ValueError(
            f"backgrounds: none of {len(self.backgrounds)} has tissue under {self.min_tissue:.0%} of the requested "
            f"mask (at most {best:.0%}); lower --backgrounds.min-tissue or change the source of masks"
        )


def tissue_of(image: np.ndarray) -> np.ndarray:
    """Where an image shows something rather than its black margin, bool (S, S).

    The local mean, over 1/16 of the side, exceeds 6 grey levels: dark lesions and shadows are tissue, padding not.
    """
    grey = as_grey(image).astype(np.float32)
    window = max(3, round(_TISSUE_WINDOW * grey.shape[0]))
    return ndimage.uniform_filter(grey, window, mode="nearest") > _TISSUE_LEVEL


def _share_of_tissue(packed: np.ndarray, mask: np.ndarray) -> float:
    inside = mask > 0
    if packed.size != (inside.size + 7) // 8:
        raise ValueError(f"backgrounds: the mask is {mask.shape[0]} px, the backgrounds are of another size")
    tissue = np.unpackbits(packed, count=inside.size).reshape(inside.shape).astype(bool)
    area = int(inside.sum())
    return 1.0 if area == 0 else float((tissue & inside).sum() / area)


def _check(name: str, feather: float, min_tissue: float) -> None:
    if not 0 <= feather <= 0.2:
        raise ValueError(f"backgrounds.{name}.feather: want 0 … .2 of the image side, got {feather}")
    if not 0 <= min_tissue <= 1:
        raise ValueError(f"backgrounds.{name}.min_tissue: want a share of 0 … 1, got {min_tissue}")
