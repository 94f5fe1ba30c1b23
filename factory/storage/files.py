"""Small files beside a table: a local folder, or objects under a prefix. Each is there whole or not at all."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

from pyarrow.fs import FileSelector, FileSystem, FileType

from factory.storage.errors import reliably, storage_faults
from factory.storage.location import StorageOptions, arrow_filesystem, local_path

_THREADS = 16
_AT_ONCE = 256
_T = TypeVar("_T")
_S = TypeVar("_S")


class Files(Protocol):
    """Files below one folder, by relative name ("records/a.json")."""

    def put(self, name: str, data: bytes) -> None:
        """Write `name`, whole or not at all, replacing an earlier one."""

    def get(self, name: str) -> bytes | None:
        """Content of `name`; None if it is not there (any more)."""

    def size(self, name: str) -> int | None:
        """Bytes of `name`; None if it is not there."""

    def names(self, folder: str) -> list[str]:
        """Sorted names, within `folder`, of its files; none if there is no such folder."""

    def delete(self, names: Sequence[str]) -> None:
        """Remove those of `names` that are there."""

    def each(self, work: Callable[[_S], _T], items: Iterable[_S]) -> Iterator[_T]:
        """`work` of each item in order; on an object store many at once, to hide its latency."""


def files_at(folder: str, table_uri: str, storage_options: StorageOptions = None) -> Files:
    """The files below `folder`, a path or URI; faults are reported as of the table at `table_uri`.

    Raises:
        ValueError: an object store that is neither s3:// nor gs://.
    """
    path = local_path(folder)
    if path is not None:
        return LocalFiles(path, table_uri)
    filesystem, root = arrow_filesystem(folder, storage_options)
    return StoreFiles(filesystem, root, table_uri)


class LocalFiles:
    """A folder. Files are written under another name, synced and renamed: whole also after a power cut."""

    def __init__(self, folder: Path, table_uri: str) -> None:
        self.folder = folder
        self._uri = table_uri

    def put(self, name: str, data: bytes) -> None:
        """See `Files`."""
        with storage_faults(self._uri, "write to the ledger of"):
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, data)

    def get(self, name: str) -> bytes | None:
        """See `Files`."""
        with storage_faults(self._uri, "read the ledger of"):
            try:
                return (self.folder / name).read_bytes()
            except FileNotFoundError:
                return None

    def size(self, name: str) -> int | None:
        """See `Files`."""
        with storage_faults(self._uri, "look at"):
            try:
                return (self.folder / name).stat().st_size
            except FileNotFoundError:
                return None

    def names(self, folder: str) -> list[str]:
        """See `Files`."""
        with storage_faults(self._uri, "list the ledger of"):
            try:
                paths = list((self.folder / folder).iterdir())
            except FileNotFoundError:
                return []
        return sorted(path.name for path in paths if not path.name.startswith("."))

    def delete(self, names: Sequence[str]) -> None:
        """See `Files`."""
        for name in names:
            remove(self.folder / name)

    def each(self, work: Callable[[_S], _T], items: Iterable[_S]) -> Iterator[_T]:
        """See `Files`."""
        return map(work, items)


class StoreFiles:
    """Objects under a prefix: one PUT each, so whole or not at all by the store's own promise."""

    def __init__(self, filesystem: FileSystem, root: str, table_uri: str) -> None:
        self._filesystem, self._root, self._uri = filesystem, root, table_uri

    def put(self, name: str, data: bytes) -> None:
        """See `Files`."""

        def write() -> None:
            stream = self._filesystem.open_output_stream(f"{self._root}/{name}")
            stream.write(data)
            stream.close()

        reliably(self._uri, "write to the ledger of", write)

    def get(self, name: str) -> bytes | None:
        """See `Files`."""

        def read() -> bytes | None:
            try:
                with self._filesystem.open_input_stream(f"{self._root}/{name}") as stream:
                    return stream.read()
            except FileNotFoundError:
                return None

        return reliably(self._uri, "read the ledger of", read)

    def size(self, name: str) -> int | None:
        """See `Files`."""
        path = f"{self._root}/{name}"
        found = reliably(self._uri, "look at", lambda: self._filesystem.get_file_info(path))
        return found.size if found.type == FileType.File else None

    def names(self, folder: str) -> list[str]:
        """See `Files`."""
        selector = FileSelector(f"{self._root}/{folder}", allow_not_found=True)
        found = reliably(self._uri, "list the ledger of", lambda: self._filesystem.get_file_info(selector))
        return sorted(item.base_name for item in found if item.type == FileType.File)

    def delete(self, names: Sequence[str]) -> None:
        """See `Files`."""

        def remove_object(name: str) -> None:
            def attempt() -> None:
                with contextlib.suppress(FileNotFoundError):
                    self._filesystem.delete_file(f"{self._root}/{name}")

            reliably(self._uri, "clear the ledger of", attempt)

        for _ in self.each(remove_object, names):
            pass

    def each(self, work: Callable[[_S], _T], items: Iterable[_S]) -> Iterator[_T]:
        """See `Files`; results of at most a few hundred items wait at a time."""
        waiting = list(items)
        if len(waiting) <= 1:
            yield from map(work, waiting)
            return
        with ThreadPoolExecutor(_THREADS) as pool:
            for start in range(0, len(waiting), _AT_ONCE):
                yield from pool.map(work, waiting[start : start + _AT_ONCE])


def write_whole(target: Path, data: bytes) -> None:
    """Write `data` to `target` atomically and durably: temporary name, fsync, rename, fsync of the folder."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(target.parent)


def remove(path: Path) -> None:
    """Remove a file if it is there."""
    path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """fsync of a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
