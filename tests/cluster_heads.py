"""Ray heads and nodes in processes of their own, as `ray start` makes them, isolated from any other Ray on the machine.

`isolated_network` allows several nodes with addresses of their own.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
TOKEN = "0123456789abcdef0123456789abcdef"  # noqa: S105
START_SECONDS = 600
KEEPALIVE = {
    "RAY_grpc_client_keepalive_time_ms": "5000",
    "RAY_grpc_client_keepalive_timeout_ms": "5000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
}
"""Settings of the files in cluster/, with which a node failure is detected in seconds."""


@dataclass
class Head:
    """A running head, and the environment of its processes and clients."""

    port: int
    address: str
    """URL of the dashboard."""
    environment: dict[str, str]
    folder: Path
    stack: ExitStack = field(default_factory=ExitStack)
    ip: str = "127.0.0.1"
    within: Sequence[str] = ()
    """Prefix of every command, which runs it in another network namespace."""

    def add_node(self, *options: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a node that joins this head, in a process with its own environment."""
        variables = self.environment | (environment or {})
        deadline = time.monotonic() + START_SECONDS
        # as on a machine of its own: nodes that share a folder overwrite each other's copies of a job's working directory
        temp_dir = tempfile.mkdtemp(prefix="n", dir=self.folder)
        while True:
            start = [
                "start", f"--address={self.ip}:{self.port}", f"--temp-dir={temp_dir}", *_agent_ports(), *options,
            ]  # fmt: skip
            try:
                return self.stack.enter_context(_running(start, variables, self.folder / "node.log", self.within))
            except RuntimeError:
                # Ray allows a raylet 30 seconds, which may be too short on a busy machine
                if time.monotonic() > deadline:
                    raise

    def mint_ray(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `mint-ray` as a client of this head, and wait for it."""
        command, variables = self._client(arguments, environment)
        return subprocess.run(command, capture_output=True, text=True, timeout=500, env=variables)

    def start_mint_ray(self, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
        """Start `mint-ray` as a client of this head, with its output in `log`."""
        command, variables = self._client(arguments, {})
        with log.open("wb") as out:
            return subprocess.Popen(command, stdout=out, stderr=out, env=variables)

    def _client(self, arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
        command = [*self.within, sys.executable, "-m", "mint_ray.cli", *arguments]
        variables = self.environment or dict(os.environ)
        return command, variables | {"RAY_API_SERVER_ADDRESS": self.address} | environment


@contextmanager
def isolated_network() -> Iterator[tuple[str, ...]]:
    """Create a network namespace with loopback only; yield the command prefix that enters it. Skips without root."""
    name = f"mint-ray-{os.getpid()}"
    try:
        subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a network namespace requires root and iproute2: {getattr(error, 'stderr', None) or error}")
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield "ip", "netns", "exec", name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


@contextmanager
def start_head(
    *options: str,
    token: str | None = TOKEN,
    ip: str = "127.0.0.1",
    port: int | None = None,
    within: Sequence[str] = (),
    **environment: str,
) -> Iterator[Head]:
    """Start a head on loopback with dashboard and Job API; with `token` None it requires no token."""
    # short, because the paths of the sockets below it are limited to 107 characters
    folder = Path(tempfile.mkdtemp(prefix="mr", dir="/tmp"))
    port, dashboard, client = port or free_port(), free_port(), free_port()
    variables = os.environ | environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    variables["RAY_agent_register_timeout_ms"] = str(START_SECONDS * 1000)
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"
    variables |= {"RAY_AUTH_MODE": "disabled"} if token is None else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    # the head sets this variable for the drivers of its jobs
    variables.pop("RAY_ADDRESS", None)
    head = Head(port, f"http://127.0.0.1:{dashboard}", variables, folder, ip=ip, within=within)
    start = [
        "start", "--head", f"--node-ip-address={ip}", f"--port={port}", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", *_agent_ports(),
        f"--temp-dir={folder}", "--num-cpus=2", "--object-store-memory=100000000", "--disable-usage-stats", *options,
    ]  # fmt: skip
    try:
        with _running(start, variables, folder / "head.log", within), head.stack:
            yield head
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a head or a node as a power failure does: SIGKILL to each of its processes."""
    if process.poll() is not None:
        return
    # the parent first: it would shut the others down gracefully
    processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in processes:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    psutil.wait_procs(processes[1:], timeout=10)


@contextmanager
def _running(
    arguments: list[str], environment: Mapping[str, str], log: Path, within: Sequence[str]
) -> Iterator[subprocess.Popen[bytes]]:
    # --block keeps it in the foreground, so that its processes are our descendants
    command = [*within, sys.executable, "-c", "from ray.scripts.scripts import main; main()", *arguments, "--block"]
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=dict(environment), stdout=out, stderr=out)
    try:
        _wait_until_started(process, log)
        yield process
    finally:
        kill(process)


def _wait_until_started(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while "Ray runtime started" not in log.read_text():
        if time.monotonic() > deadline or process.poll() is not None:
            raise RuntimeError(f"did not start: {log.read_text()[-2000:]}")
        time.sleep(0.25)


def _agent_ports() -> list[str]:
    # without given ports the raylet waits for its agents to choose some, and times out on a busy machine
    names = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export")
    return [f"--{name}-port={free_port()}" for name in names]


def free_port() -> int:
    """Return a port that is free at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
