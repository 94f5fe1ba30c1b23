"""Storage options: where they come from, and that their values are not repeated."""

import json
import os
from pathlib import Path

import pytest

from factory.storage import (
    absolute_uri,
    cache_folder,
    parse_storage_options,
    resolve_options,
    take_storage_options,
)
from factory.storage.location import (
    CACHE_VARIABLE,
    OPTIONS_VARIABLE,
    arrow_filesystem,
    lance_options,
    local_path,
)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv(OPTIONS_VARIABLE, "")


def test_the_flag_is_taken_out_of_any_command_and_holds_for_child_processes() -> None:
    argv = ["query", "s3://b/t.lance", "--storage-options", "aws_region=eu-west-1"]
    more = [
        "width=128",
        "--storage-options",
        "AWS_ENDPOINT=http://h:1",
        "--storage-options=aws_session_token=a=b",
    ]
    assert take_storage_options([*argv, *more]) == ["query", "s3://b/t.lance", "width=128"]
    given = {"aws_region": "eu-west-1", "aws_endpoint": "http://h:1", "aws_session_token": "a=b"}
    assert json.loads(os.environ[OPTIONS_VARIABLE]) == given == resolve_options(None)
    assert resolve_options({"aws_region": "us-east-1"})["aws_region"] == "us-east-1"
    assert take_storage_options(["query", "x"]) == ["query", "x"] and resolve_options(None) == given


def test_bad_options_are_named_without_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no name.*want KEY=VALUE") as caught:
        parse_storage_options(["=hunter2"])
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ValueError, match="want KEY=VALUE after it"):
        take_storage_options(["query", "--storage-options", "--limit", "3"])
    monkeypatch.setenv(OPTIONS_VARIABLE, '{"aws_secret_access_key": "hunter2"')
    with pytest.raises(ValueError, match=OPTIONS_VARIABLE) as caught:
        resolve_options(None)
    assert "hunter2" not in str(caught.value)


def test_an_unencrypted_endpoint_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lance_options(None) is None
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    assert lance_options(None) == {"aws_endpoint": "http://127.0.0.1:9000", "allow_http": "true"}
    assert lance_options({"endpoint": "https://h"}) == {"endpoint": "https://h"}


def test_a_cache_lies_beside_a_local_table_and_in_a_folder_for_a_remote_one(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_folder("/data/real.lance/") == Path("/data/real.lance.cache")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    first, second = cache_folder("s3://a/real.lance"), cache_folder("s3://b/real.lance/")
    assert first.parent == second.parent == tmp_path and first != second
    assert first.name.startswith("real.lance-") and second == cache_folder("s3://b/real.lance")


def test_uris_and_paths_are_told_apart(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("t.lance") == str(tmp_path / "t.lance")
    assert absolute_uri("s3://b/t.lance") == "s3://b/t.lance"
    assert str(local_path("file:///a%20b/t.lance")) == "/a b/t.lance" and local_path("gs://b/t") is None
    assert arrow_filesystem("s3://b/a/t.lance/", {"aws_endpoint": "http://h:1"})[1] == "b/a/t.lance"
    with pytest.raises(ValueError, match="want s3://bucket/path"):
        arrow_filesystem("s3:///t.lance", None)
    with pytest.raises(ValueError, match="GOOGLE_APPLICATION_CREDENTIALS"):
        arrow_filesystem("gs://b/t.lance", {"google_service_account": "key.json"})
