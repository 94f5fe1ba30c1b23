"""Where a table is: paths, URIs, and how to reach them.

Tables live on a local or mounted file system, or on an object store (`s3://bucket/path`, `gs://bucket/path`). How a
store is reached (endpoint, region, credentials) comes from `storage_options`, else from FACTORY_STORAGE_OPTIONS, else
from what its own tools read (AWS_*, GOOGLE_APPLICATION_CREDENTIALS, the machine's role). None of it is ever stored.
"""

import functools
import json
import os
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from schemas.identity import hash_parts

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

StorageOptions = Mapping[str, str] | None
"""Credentials, endpoint and the like of an object store, by Lance's names: aws_endpoint, aws_region, …"""

OPTIONS_VARIABLE = "FACTORY_STORAGE_OPTIONS"
"""Environment variable with storage options as a JSON object: how `--storage-options` reaches child processes."""
CACHE_VARIABLE = "FACTORY_CACHE_DIR"
"""Environment variable with the folder for caches of tables on object stores."""
_FLAG = "--storage-options"
_S3_NAMES = {
    "access_key_id": "access_key",
    "secret_access_key": "secret_key",
    "session_token": "session_token",
    "token": "session_token",
    "region": "region",
    "default_region": "region",
    "endpoint": "endpoint_override",
    "endpoint_url": "endpoint_override",
}
"""Lance's names without "aws_", and pyarrow's."""
_S3_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_S3_REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")


def parse_storage_options(items: Sequence[str]) -> dict[str, str]:
    """Options from `KEY=VALUE` items.

    Raises:
        ValueError: an item is not of that form; its value is not repeated.
    """
    options = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ValueError(f"{_FLAG} {key or '(no name)'}: want KEY=VALUE, such as aws_region=eu-west-1")
        options[key.lower()] = value
    return options


def take_storage_options(argv: Sequence[str]) -> list[str]:
    """Take every `--storage-options KEY=VALUE` out of a command line; they hold for this process and its children.

    Returns:
        The arguments without them.

    Raises:
        ValueError: the flag is there and no KEY=VALUE follows it.
    """
    rest: list[str] = []
    found: list[str] = []
    position = 0
    while position < len(argv):
        item = argv[position]
        position += 1
        if item.startswith(f"{_FLAG}="):
            found.append(item.removeprefix(f"{_FLAG}="))
        elif item == _FLAG:
            if position == len(argv) or "=" not in argv[position] or argv[position].startswith("-"):
                raise ValueError(f"{_FLAG}: want KEY=VALUE after it, such as aws_region=eu-west-1")
            found.append(argv[position])
            position += 1
        else:
            rest.append(item)
    if found:
        os.environ[OPTIONS_VARIABLE] = json.dumps(resolve_options(None) | parse_storage_options(found))
    return rest


def resolve_options(storage_options: StorageOptions) -> dict[str, str]:
    """`storage_options` over those of the environment (FACTORY_STORAGE_OPTIONS).

    Raises:
        ValueError: the variable is not a JSON object of text.
    """
    text = os.environ.get(OPTIONS_VARIABLE, "")
    try:
        inherited = json.loads(text) if text else {}
    except json.JSONDecodeError:
        inherited = None
    if not isinstance(inherited, dict) or not all(isinstance(value, str) for value in inherited.values()):
        raise ValueError(
            f'{OPTIONS_VARIABLE}: want a JSON object of text, such as {{"aws_region": "eu-west-1"}}'
        )
    return {**inherited, **(storage_options or {})}


def lance_options(storage_options: StorageOptions) -> dict[str, str] | None:
    """The options as Lance wants them, those of the environment included: a dict, or None for none.

    An endpoint that is written http:// may be used without encryption; it is not asked for twice.
    """
    options = resolve_options(storage_options)
    if not any(name.removeprefix("aws_") in ("endpoint", "endpoint_url") for name in options):
        endpoint = _first_set(_S3_ENDPOINTS)
        options |= {"aws_endpoint": endpoint} if endpoint else {}
    if any(value.startswith("http://") for value in options.values()):
        options.setdefault("allow_http", "true")
    return options or None


def local_path(uri: str) -> Path | None:
    """The path of a table on a local or mounted file system; None for an object store."""
    if uri.startswith("file://"):
        return Path(urllib.request.url2pathname(urllib.parse.urlparse(uri).path))
    return None if "://" in uri else Path(uri)


def is_remote(uri: str) -> bool:
    """Whether `uri` is on an object store."""
    return local_path(str(uri)) is None


def absolute_uri(uri: str) -> str:
    """`uri`, or the absolute path of a local one: worker processes have working directories of their own."""
    return uri if "://" in uri else str(Path(uri).expanduser().resolve())


def ledger_folder(uri: str) -> str:
    """The folder beside the table at `uri`, on the same file system or under the same prefix."""
    return str(uri).rstrip("/") + ".ledger"


def cache_folder(uri: str) -> Path:
    """Where what is derived from the table at `uri` may be kept: beside a local table.

    For one on an object store, a folder of its own in FACTORY_CACHE_DIR, or in the user's cache.
    """
    path = local_path(str(uri).rstrip("/"))
    if path is not None:
        return path.with_name(f"{path.name}.cache")
    root = os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "synthetic-data-factory"
    digest = hash_parts("cache", str(uri).rstrip("/"))[:12]
    return Path(root) / f"{str(uri).rstrip('/').rsplit('/', 1)[-1]}-{digest}.cache"


def arrow_filesystem(uri: str, storage_options: StorageOptions) -> "tuple[FileSystem, str]":
    """pyarrow's file system for an object-store URI, and the path of the URI in it (bucket/key).

    Raises:
        ValueError: a scheme other than s3 and gs, or no bucket.
    """
    parts = urllib.parse.urlsplit(uri)
    if not parts.netloc:
        raise ValueError(f"{uri}: want s3://bucket/path or gs://bucket/path")
    options = tuple(sorted((lance_options(storage_options) or {}).items()))
    path = f"{parts.netloc}{urllib.parse.unquote(parts.path)}".rstrip("/")
    if parts.scheme in ("s3", "s3a"):
        return _s3(options, _first_set(_S3_REGIONS)), path
    if parts.scheme in ("gs", "gcs"):
        return _gcs(options), path
    raise ValueError(f"{uri}: tables are kept in local folders, s3:// and gs://, not {parts.scheme}://")


@functools.lru_cache(maxsize=8)
def _s3(options: tuple[tuple[str, str], ...], region: str | None) -> "FileSystem":
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    named = {name.removeprefix("aws_"): value for name, value in options}
    settings = {_S3_NAMES[name]: value for name, value in named.items() if name in _S3_NAMES}
    if region or "endpoint_override" in settings:
        settings.setdefault("region", region or "us-east-1")
    scheme, separator, host = settings.get("endpoint_override", "").partition("://")
    if separator:
        settings |= {"scheme": scheme, "endpoint_override": host.rstrip("/")}
    return S3FileSystem(
        **settings,
        anonymous=named.get("skip_signature", "").lower() == "true",
        allow_delayed_open=True,  # a small file is then one PUT
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=3),
    )


@functools.lru_cache(maxsize=8)
def _gcs(options: tuple[tuple[str, str], ...]) -> "FileSystem":
    from pyarrow.fs import GcsFileSystem

    known = dict(options)
    if "google_service_account" in known or "service_account" in known:
        # Lance takes a key file as an option, pyarrow from the environment alone.
        raise ValueError("gs://: name the service account's key file in GOOGLE_APPLICATION_CREDENTIALS")
    return GcsFileSystem(anonymous=known.get("google_skip_signature", "").lower() == "true")


def _first_set(names: Sequence[str]) -> str | None:
    return next((value for name in names if (value := os.environ.get(name))), None)
