"""Leaving the factory: synthetic tables, alone or mixed with real training rows, in the formats people train with.

`FORMATS` names the writers, one file each. `factory.export.write.write_export` selects rows, streams them
through a writer and adds the manifest, the checksums and the dataset card. `factory.export.torch_dataset` reads
the tables themselves from PyTorch, without an export.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from factory.export.coco import CocoWriter
from factory.export.folder import FolderWriter
from factory.export.huggingface import HuggingFaceWriter
from factory.export.items import ExportLayout, FormatWriter
from factory.export.nnunet import NnunetWriter
from factory.export.webdataset import WebDatasetWriter

FORMATS: Mapping[str, Callable[[Path, ExportLayout], FormatWriter]] = {
    "folder": FolderWriter,
    "nnunet": NnunetWriter,
    "huggingface": HuggingFaceWriter,
    "webdataset": WebDatasetWriter,
    "coco": CocoWriter,
}
"""Name on the command line → writer of that format."""

NEEDS_MASK = frozenset({"nnunet", "coco"})
"""Formats in which an image without mask would read as one without lesion; such rows are left out of them."""

__all__ = ["FORMATS", "NEEDS_MASK", "ExportLayout", "FormatWriter"]
