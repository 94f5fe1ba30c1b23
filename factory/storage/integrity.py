"""Is a table whole? Every data file there, of its size and readable; every stored picture as it was written.

Found and named: missing, truncated and unreadable files, and damage inside PNG images and masks (each of their chunks
carries a checksum). Flipped bits in other columns that still decode are not found: Lance keeps no checksums of pages.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import lance
import pyarrow as pa

from factory.storage.table import Table
from factory.storage.writer import data_files

_PICTURES = ("image", "mask", "requested_mask")
_BATCH_ROWS = 256
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One thing that is wrong.

    Attributes:
        fragment: number of the fragment in the table.
        file: data file below `data/`.
        fault: what is wrong, in words.
    """

    fragment: int
    file: str
    fault: str

    def __str__(self) -> str:
        return f"fragment {self.fragment}, data/{self.file}: {self.fault}"


def check_table(table: Table) -> Iterator[Damage]:
    """Look at every data file, every column and every picture of a version of a table; yields what is wrong.

    Reads everything once, `_BATCH_ROWS` rows at a time.
    """
    files = data_files(table.uri, table.storage_options)
    id_column = "request_id" if "request_id" in table.schema.names else "image_id"
    for fragment in table.dataset.get_fragments():
        named = [(str(item.path), item.file_size_bytes) for item in fragment.metadata.files]
        broken = []
        for name, size in named:
            there = files.size(name)
            if there is None:
                broken.append(Damage(fragment=fragment.fragment_id, file=name, fault="the file is missing"))
            elif size is not None and there != size:
                fault = f"the file has {there} bytes, not {size}"
                broken.append(Damage(fragment=fragment.fragment_id, file=name, fault=fault))
        yield from broken or _unreadable(fragment, named[0][0], id_column)


def _unreadable(fragment: lance.LanceFragment, file: str, id_column: str) -> Iterator[Damage]:
    number = fragment.fragment_id
    try:
        for batch in fragment.to_batches(batch_size=_BATCH_ROWS):
            for row, name in _broken_pictures(batch):
                which = (
                    f"{id_column} {batch[id_column][row]}"
                    if id_column in batch.schema.names
                    else f"row {row}"
                )
                yield Damage(
                    fragment=number, file=file, fault=f"{name} of {which} is not the PNG that was written"
                )
    except Exception as fault:  # whatever Lance's decoders meet in damaged bytes, down to a panic of theirs
        yield Damage(fragment=number, file=file, fault=f"cannot be read: {str(fault).splitlines()[0][:200]}")


def _broken_pictures(batch: pa.RecordBatch) -> Iterator[tuple[int, str]]:
    for name in _PICTURES:
        if name in batch.schema.names:
            for row, data in enumerate(batch[name]):
                if data.is_valid and not _is_whole_png(data.as_py()):
                    yield row, name


def _is_whole_png(data: bytes) -> bool:
    """Whether `data` is a PNG whose chunks all have their checksum, up to its end. Other formats are let pass."""
    if not data.startswith(_SIGNATURE):
        return data[:2] == b"\xff\xd8" or data[:4] in (b"II*\0", b"MM\0*")
    position = len(_SIGNATURE)
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 8 + length
        if (
            end + 4 > len(data)
            or zlib.crc32(data[position + 4 : end]) != struct.unpack_from(">I", data, end)[0]
        ):
            return False
        if data[position + 4 : position + 8] == b"IEND":
            return end + 4 == len(data)
        position = end + 4
    return False
