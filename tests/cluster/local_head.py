"""A Ray head of its own, and further nodes, for tests: started by `ray start`, killed by killing their own processes.

Every port is a free one, the temporary folder is new and the dashboard listens on loopback, so it neither
joins nor disturbs another Ray of this machine. `ray stop` is never used: it would stop them all.
"""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

START_SECONDS = 180
START_TRIES = 5
_WORKER_PORTS = range(10002, 20000)


def free_port() -> int:
    """A port nobody listens on, outside the range that Ray's workers take."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in _WORKER_PORTS:
            return port


class _Started:
    """A `ray start --block` with what it starts; killed as a power cut would."""

    def __init__(self, options: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        command = [
            str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats",
            "--object-store-memory", "200000000", "--min-worker-port", "0", "--max-worker-port", "0",
            "--dashboard-agent-listen-port", str(free_port()), "--dashboard-agent-grpc-port", str(free_port()),
            "--metrics-export-port", str(free_port()), *options,
        ]  # fmt: skip
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command,
                env=dict(environment),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def log(self) -> str:
        """The end of what it printed."""
        return self._log.read_text()[-2000:]

    def wait_until_started(self) -> bool:
        """Until `ray start` says that it joined; False where it gave up: on a busy machine its 30 s are too few."""
        deadline = time.monotonic() + START_SECONDS
        while "Ray runtime started" not in self._log.read_text():
            if not self.is_running or time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True

    def family(self) -> list[psutil.Process]:
        """It and every process below it."""
        if not self.is_running:
            return []
        first = psutil.Process(self._process.pid)
        return [first, *first.children(recursive=True)]

    def kill(self) -> None:
        """kill -9 of all of them at once."""
        family = self.family()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=15)
        self._process.wait()


class LocalNode(_Started):
    """A worker node: a raylet of its own."""

    def actors(self, name: str = "") -> list[psutil.Process]:
        """Its processes that hold actors whose title contains `name`."""
        found = []
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                title = " ".join(process.cmdline())
                if title.startswith("ray::") and not title.startswith("ray::IDLE") and name in title:
                    found.append(process)
        return found


class LocalHead:
    """A running head with the job server.

    Attributes:
        url: address of the job server, for `--address` of `factory submit`.
        address: of the cluster, for `--address` of a verb.
        token: what a client must send; made for this head.
        nodes: the worker nodes that were added and not killed.
    """

    def __init__(
        self,
        num_cpus: int = 2,
        *,
        token: str | None = None,
        dashboard_port: int | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.token = token or secrets.token_hex(16)
        self._variables = dict(variables or {})
        self._num_cpus, self._dashboard_port = num_cpus, dashboard_port
        self.nodes: list[LocalNode] = []
        for _ in range(START_TRIES):
            self._start()
            if self._head.wait_until_started() and self._answers():
                return
            said = self._head.log()
            self.close()
        raise TimeoutError(f"no head after {START_TRIES} tries; the last said: {said}")

    def _start(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="rh", dir="/tmp"))  # short: a socket's path has a limit
        port, dashboard = free_port(), self._dashboard_port or free_port()
        self.address, self.url = f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
        options = [
            "--head", "--num-cpus", str(self._num_cpus), "--port", str(port), "--include-dashboard", "true",
            "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard),
            "--ray-client-server-port", str(free_port()), "--temp-dir", str(self._folder),
        ]  # fmt: skip
        self._head = _Started(options, self.environment(), self._folder / "head.log")

    def environment(self, token: str | None = None) -> dict[str, str]:
        """Environment of the head and of its clients. The folder of this Python comes first on PATH."""
        ours = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return ours | {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token or self.token,
            "RAY_TMPDIR": str(self._folder),
            "RAY_TRAIN_V2_ENABLED": "1",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "OMP_NUM_THREADS": "1",
            "RAY_worker_niceness": "0",  # 15 by default: beside other tests nothing would move
            **self._variables,
        }

    def _answers(self) -> bool:
        """Whether the job server answers in time."""
        request = urllib.request.Request(f"{self.url}/api/version")
        request.add_header("authorization", f"Bearer {self.token}")
        deadline = time.monotonic() + START_SECONDS
        while self._head.is_running and time.monotonic() < deadline:
            try:
                urllib.request.urlopen(request, timeout=5).close()
                return True
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        return False

    @property
    def is_running(self) -> bool:
        """Whether the head has not ended."""
        return self._head.is_running

    def add_node(self, num_cpus: int) -> LocalNode:
        """Start another node on this machine; it joins while the caller goes on."""
        options = ["--address", self.address, "--num-cpus", str(num_cpus)]
        log = self._folder / f"node-{secrets.token_hex(3)}.log"
        node = LocalNode(options, self.environment(), log)
        self.nodes.append(node)
        return node

    def kill_node(self, node: LocalNode) -> None:
        """Cut a node's power."""
        self.nodes.remove(node)
        node.kill()

    def kill(self) -> None:
        """Cut the power of the head and of all nodes."""
        for started in (self._head, *self.nodes):
            started.kill()
        self.nodes.clear()

    def close(self) -> None:
        """Kill it and remove its folder."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> "LocalHead":
        return self

    def __exit__(self, *details: object) -> None:
        self.close()
