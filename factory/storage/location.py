"""Where a table is: paths, URIs, and how to reach them."""

import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path

StorageOptions = Mapping[str, str] | None
"""Credentials, endpoint and the like of an object store, as Lance takes them."""


def lance_options(storage_options: StorageOptions) -> dict[str, str] | None:
    """The options as Lance wants them: a dict, or None for none."""
    return dict(storage_options) if storage_options else None


def local_path(uri: str) -> Path | None:
    """The path of a table on a local or mounted file system; None for an object store."""
    if uri.startswith("file://"):
        return Path(urllib.request.url2pathname(urllib.parse.urlparse(uri).path))
    return None if "://" in uri else Path(uri)


def ledger_folder(uri: str) -> str:
    """The folder beside the table at `uri`, on the same file system or under the same prefix."""
    return str(uri).rstrip("/") + ".ledger"
