"""A Ray head in a process of its own, as `ray start` makes it, that ends without a word to other people's Rays."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
TOKEN = "0123456789abcdef0123456789abcdef"  # noqa: S105
START_SECONDS = 180


@dataclass
class Head:
    """Where it is, and the environment in which its processes and clients run."""

    port: int
    address: str
    """Of the dashboard."""
    environment: dict[str, str]
    folder: Path
    stack: ExitStack = field(default_factory=ExitStack)

    def join(self, *options: str, environment: Mapping[str, str]) -> None:
        """Start a second machine, in a process, with its own environment."""
        start = ["start", f"--address=127.0.0.1:{self.port}", *_agent_ports(), *options]
        self.stack.enter_context(_running(start, self.environment | environment, self.folder / "node.log"))

    def mint_ray(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the command line as a client of this head."""
        command = [sys.executable, "-m", "mint_ray.cli", *arguments]
        told = (self.environment or os.environ) | {"RAY_API_SERVER_ADDRESS": self.address} | environment
        return subprocess.run(command, capture_output=True, text=True, timeout=500, env=told)


@contextmanager
def start_head(*options: str, token: str | None = TOKEN, **environment: str) -> Iterator[Head]:
    """A head on loopback with the dashboard's whole Job API; `token` None leaves it open to everybody."""
    # short: the sockets below it may have 107 characters
    folder = Path(tempfile.mkdtemp(prefix="mr", dir="/tmp"))
    port, dashboard, client = (_free_port() for _ in range(3))
    told = os.environ | environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    told["RAY_agent_register_timeout_ms"] = str(START_SECONDS * 1000)
    told["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{told['PATH']}"
    told |= {"RAY_AUTH_MODE": "disabled"} if token is None else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    # drivers of the head's own jobs are told where it is
    told.pop("RAY_ADDRESS", None)
    head = Head(port, f"http://127.0.0.1:{dashboard}", told, folder)
    start = [
        "start", "--head", "--node-ip-address=127.0.0.1", f"--port={port}", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", *_agent_ports(),
        f"--temp-dir={folder}", "--num-cpus=2", "--object-store-memory=100000000", "--disable-usage-stats", *options,
    ]  # fmt: skip
    try:
        with _running(start, told, folder / "head.log"), head.stack:
            yield head
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _running(arguments: list[str], environment: Mapping[str, str], log: Path) -> Iterator[None]:
    # in the foreground, its processes are children of ours
    command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", *arguments, "--block"]
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=dict(environment), stdout=out, stderr=out)
    try:
        _wait(process, log)
        yield
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for each in [psutil.Process(process.pid), *children] if process.poll() is None else []:
            try:
                each.kill()
            except psutil.NoSuchProcess:
                continue
        process.wait()
        psutil.wait_procs(children, timeout=10)


def _wait(process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while "Ray runtime started" not in log.read_text():
        if time.monotonic() > until or process.poll() is not None:
            raise RuntimeError(f"it did not come up: {log.read_text()[-2000:]}")
        time.sleep(0.25)


def _agent_ports() -> list[str]:
    # told, or the raylet waits for its agents to find some, and gives up on a busy machine
    names = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export")
    return [f"--{name}-port={_free_port()}" for name in names]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
