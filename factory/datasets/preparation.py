"""From verified images to rows of `real.lance`: embed, group, split, summarise.

Nothing here writes a table; `jobs/prepare.py` does.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from factory.datasets.layout import Layout
from factory.datasets.near_duplicates import DuplicateGroups, NearDuplicates, connected_groups
from factory.datasets.shortcuts import shortcut_check
from factory.datasets.splits import assign_splits, group_folds, keep_training_groups
from factory.datasets.summary import Facts, Summary, describe_duplicates, summarise
from factory.datasets.verification import VerifiedImage
from factory.imaging import encode_png
from schemas.identity import hash_parts
from schemas.sample import RealSample, real_schema, table_of

_ROWS_PER_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class PreparedDataset:
    """Everything about a dataset but its table.

    Attributes:
        images: verified images, in row order.
        image_ids: hash of pixels, mask and label; a repeated one also counts the repeats.
        embeddings: (N, D) float32.
        group_ids, splits: per image.
        class_names: label order.
        layout: where the images came from.
        groups: near-duplicates found.
        summary: what `prepare` prints and stores.
    """

    images: Sequence[VerifiedImage]
    image_ids: Sequence[str]
    embeddings: np.ndarray
    group_ids: Sequence[str]
    splits: Sequence[str]
    class_names: tuple[str, ...]
    layout: Layout
    groups: DuplicateGroups
    summary: Summary

    @property
    def schema(self) -> pa.Schema:
        """Schema of the rows."""
        return real_schema(self.embeddings.shape[1])

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows, a few at a time, images and masks encoded."""
        for start in range(0, len(self.images), _ROWS_PER_BATCH):
            stop = min(start + _ROWS_PER_BATCH, len(self.images))
            yield from table_of([self._row(i) for i in range(start, stop)], self.schema).to_batches()

    def _row(self, index: int) -> RealSample:
        verified = self.images[index]
        item, image = verified.item, verified.image
        return RealSample(
            image_id=self.image_ids[index],
            dataset=self.layout.name,
            source_path=item.source_path,
            patient_id=item.patient_id,
            group_id=self.group_ids[index],
            split=self.splits[index],
            label=self.class_names.index(item.label_name),
            label_name=item.label_name,
            image=encode_png(image),
            mask=None if verified.mask is None else encode_png(verified.mask),
            height=image.shape[0],
            width=image.shape[1],
            photometric="grey" if image.ndim == 2 else "rgb",
            pixel_spacing=item.pixel_spacing,
            device=item.device,
            has_marks=verified.has_marks,
            attributes=verified.attributes,
            licence=self.layout.licence,
            allowed_use=self.layout.allowed_use,
            embedding=tuple(self.embeddings[index].tolist()),
        )


def image_ids(images: Sequence[VerifiedImage]) -> list[str]:
    """Content hash of pixels, mask and label of each image: 32 hex characters, all different.

    An exact repetition, pixels, mask and label, also hashes how many came before it in row order.
    """
    seen: dict[str, int] = {}
    ids = []
    for verified in images:
        parts: list[str | bytes | int] = [str(verified.image.shape), verified.image.tobytes()]
        parts.append(b"" if verified.mask is None else verified.mask.tobytes())
        identity = hash_parts("image", *parts, verified.item.label_name)
        count = seen.get(identity, 0)
        seen[identity] = count + 1
        ids.append(identity if not count else hash_parts(identity, count))
    return ids


def group_images(
    images: Sequence[VerifiedImage],
    embeddings: np.ndarray,
    search: NearDuplicates | None,
    progress: Callable[[int], None] = lambda count: None,
) -> DuplicateGroups:
    """Groups of near-duplicates, joined with patients where they are known.

    `search` None: only patients are kept together.
    """
    found = DuplicateGroups(group=np.arange(len(images)), pairs=(), num_candidates=0)
    if search is not None:
        found = search.find(
            [verified.image for verified in images],
            embeddings,
            sequences=[verified.item.sequence for verified in images],
            progress=progress,
        )
    first_of: dict[str, int] = {}
    links = [(pair.first, pair.second) for pair in found.pairs]
    for index, verified in enumerate(images):
        if verified.item.patient_id is not None:
            links.append((first_of.setdefault(verified.item.patient_id, index), index))
    return replace(found, group=connected_groups(len(images), links))


def sensitivity(groups: DuplicateGroups, search: NearDuplicates) -> dict[str, int]:
    """Number of groups if only part of the links counted: how much the splits hang on the thresholds."""
    rules: dict[str, Callable[[float, str], bool]] = {
        "frames only": lambda correlation, kind: kind == "frame",
        "frames and examinations": lambda correlation, kind: kind != "neighbour",
        f"correlation ≥ {search.frame_threshold + 0.3:.2f}": lambda correlation, kind: (
            correlation >= search.frame_threshold + 0.3
        ),
    }
    counts = {}
    for name, keeps in rules.items():
        links = [(pair.first, pair.second) for pair in groups.pairs if keeps(pair.correlation, pair.kind)]
        counts[name] = len(np.unique(connected_groups(len(groups.group), links)))
    return counts


def prepare_dataset(
    images: Sequence[VerifiedImage],
    embeddings: np.ndarray,
    layout: Layout,
    class_names: tuple[str, ...],
    *,
    search: NearDuplicates | None,
    fractions: Sequence[float],
    seed: int,
    num_train: int | None = None,
    reserve_fold: tuple[int, int] | None = None,
    num_quarantined: int = 0,
    progress: Callable[[int], None] = lambda count: None,
) -> PreparedDataset:
    """Group, split and summarise.

    Args:
        images: verified images, in row order.
        embeddings: (N, D) float32, unit norm.
        layout: where they came from.
        class_names: label order.
        search: how near-duplicates are found; None where images are independent by construction.
        fractions: shares of train, val, test.
        seed: of the splits.
        num_train: training images to keep; whole groups of the others go to `reserve`. All by default.
        reserve_fold: (K, F): fold K of F of what is left in train goes to `reserve` too.
        num_quarantined: items left out, for the summary.
        progress: called with the number of images searched.

    Raises:
        ValueError: too few groups for the splits.
    """
    labels = np.array([class_names.index(verified.item.label_name) for verified in images])
    groups = group_images(images, embeddings, search, progress)
    ids = image_ids(images)
    group_ids = _group_ids(groups.group, ids)
    splits = assign_splits(groups.group, labels, fractions, seed).tolist()
    splits = _with_reserve(splits, group_ids, labels, num_train, reserve_fold, seed)
    facts = Facts(
        source_path=[verified.item.source_path for verified in images],
        label_name=[verified.item.label_name for verified in images],
        split=splits,
        image=[verified.image for verified in images],
        mask=[verified.mask for verified in images],
        has_marks=[verified.has_marks for verified in images],
    )
    summary = summarise(
        facts,
        class_names,
        dataset=layout.name,
        unit=layout.unit,
        groups=groups,
        duplicates=describe_duplicates(groups, search, sensitivity(groups, search) if search else {}),
        shortcuts=shortcut_check(facts.image, facts.has_marks, labels, groups.group),
        num_quarantined=num_quarantined,
    )
    return PreparedDataset(
        images=images,
        image_ids=ids,
        embeddings=embeddings,
        group_ids=group_ids,
        splits=splits,
        class_names=class_names,
        layout=layout,
        groups=groups,
        summary=summary,
    )


def _with_reserve(
    splits: list[str],
    group_ids: Sequence[str],
    labels: np.ndarray,
    num_train: int | None,
    reserve_fold: tuple[int, int] | None,
    seed: int,
) -> list[str]:
    """The splits with the training groups that are left out moved to `reserve`."""

    def train() -> np.ndarray:
        return np.flatnonzero(np.array(splits) == "train")

    def reserve(rows: np.ndarray) -> list[str]:
        gone = set(rows.tolist())
        return ["reserve" if row in gone else split for row, split in enumerate(splits)]

    if num_train is not None:
        rows = train()
        kept = keep_training_groups([group_ids[row] for row in rows], labels[rows], num_train, seed)
        splits = reserve(rows[~kept])
    if reserve_fold is not None:
        rows, (number, num_folds) = train(), reserve_fold
        folds = group_folds([group_ids[row] for row in rows], labels[rows], num_folds)
        splits = reserve(rows[folds == number])
    return splits


def _group_ids(group: np.ndarray, ids: Sequence[str]) -> list[str]:
    """The smallest image_id of each group: independent of row order."""
    first: dict[int, str] = {}
    for number, identity in zip(group.tolist(), ids):
        first[number] = min(first.get(number, identity), identity)
    return [first[number] for number in group.tolist()]
