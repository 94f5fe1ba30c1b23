"""The pages of `factory browse`: what they show, and what a bad filter or a missing package is answered with."""

import importlib.util
import ipaddress
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from factory.storage import open_table
from jobs import browse
from jobs.browse import Args, build, page


def test_a_page_shows_pictures_captions_and_rows(real_table: str) -> None:
    first = page(real_table, "label_name = 'malignant'", 0, 3)
    assert len(first) == 3
    picture, caption, text = first[0]
    assert picture.ndim == 3 and picture.std() > 0
    assert caption == "malignant"
    row = json.loads(text)
    assert row["label_name"] == "malignant" and "image" not in row and "embedding" not in row


def test_pages_follow_each_other(real_table: str) -> None:
    count = open_table(real_table).count("split <> 'test'")
    assert 25 < count < open_table(real_table).count()
    pages = [page(real_table, "", offset, 25) for offset in range(0, count, 25)]
    ids = [json.loads(text)["image_id"] for cells in pages for *_, text in cells]
    assert len(ids) == len(set(ids)) == count


def test_a_bad_filter_is_named(real_table: str) -> None:
    with pytest.raises(ValueError, match="colour"):
        page(real_table, "colour = 'red'", 0, 3)


@pytest.mark.skipif(importlib.util.find_spec("gradio") is not None, reason="gradio is installed")
def test_without_gradio_it_says_what_to_install(real_table: str) -> None:
    with pytest.raises(ValueError, match=r"requirements/browse\.txt"):
        build(Args(table=real_table))


def test_it_is_launched_on_loopback_without_a_public_link(
    real_table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Any]] = []

    class Page:
        """Takes the place of gradio's page, which may not be installed; keeps what it is launched with."""

        def launch(self, **options: Any) -> None:
            started.append(options)

    monkeypatch.setattr(browse, "build", lambda args: Page())
    for name, value in (("GRADIO_SERVER_NAME", "0.0.0.0"), ("GRADIO_SHARE", "True")):
        monkeypatch.setenv(name, value)
    assert browse.command([real_table, "--port", "7999"]) == 0
    assert started[0]["server_port"] == 7999 and started[0]["share"] is False
    assert ipaddress.ip_address(started[0]["server_name"]).is_loopback
    with pytest.raises(SystemExit):  # there is no word that opens it to others
        browse.command([real_table, "--host", "0.0.0.0"])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed")
def test_the_running_server_listens_on_loopback_alone(real_table: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; from jobs.browse import command; sys.exit(command(sys.argv[1:]))"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "GRADIO_SERVER_NAME": "0.0.0.0"}
    server = subprocess.Popen([sys.executable, "-c", code, real_table, "--port", str(port)], env=environment)
    try:
        deadline = time.monotonic() + 60
        listening: list[str] = []
        while not listening and time.monotonic() < deadline:
            assert server.poll() is None
            found = psutil.Process(server.pid).net_connections(kind="inet")
            listening = [item.laddr.ip for item in found if item.status == psutil.CONN_LISTEN]
            time.sleep(0.2)
        assert listening and all(ipaddress.ip_address(ip).is_loopback for ip in listening)
    finally:
        server.terminate()
        server.wait(timeout=20)
