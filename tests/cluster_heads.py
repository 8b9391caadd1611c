"""A Ray head and its machines in processes of their own, as `ray start` makes them, that end without a word to other
people's Rays; several machines with addresses of their own in a network that has loopback alone."""

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
"""What the files of cluster/ set, so that a lost machine is missed in seconds."""


@dataclass
class Head:
    """Where it is, and the environment in which its processes and clients run."""

    port: int
    address: str
    """Of the dashboard."""
    environment: dict[str, str]
    folder: Path
    stack: ExitStack = field(default_factory=ExitStack)
    ip: str = "127.0.0.1"
    within: Sequence[str] = ()
    """Words ahead of every command, which lead it into another network."""

    def join(self, *options: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a second machine, in a process, with its own environment."""
        told = self.environment | (environment or {})
        until = time.monotonic() + START_SECONDS
        while True:
            start = ["start", f"--address={self.ip}:{self.port}", *_agent_ports(), *options]
            try:
                return self.stack.enter_context(_running(start, told, self.folder / "node.log", self.within))
            except RuntimeError:
                # Ray gives a raylet half a minute, which may be too short on a busy machine
                if time.monotonic() > until:
                    raise

    def mint_ray(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the command line as a client of this head."""
        command, told = self._client(arguments, environment)
        return subprocess.run(command, capture_output=True, text=True, timeout=500, env=told)

    def start_mint_ray(self, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
        """The same without waiting for its end; what it says goes to `log`."""
        command, told = self._client(arguments, {})
        with log.open("wb") as out:
            return subprocess.Popen(command, stdout=out, stderr=out, env=told)

    def _client(self, arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
        command = [*self.within, sys.executable, "-m", "mint_ray.cli", *arguments]
        known = self.environment or dict(os.environ)
        return command, known | {"RAY_API_SERVER_ADDRESS": self.address} | environment


@contextmanager
def lonely_network() -> Iterator[tuple[str, ...]]:
    """A network namespace that has loopback alone: the words that lead a command into it. Skips without root."""
    name = f"mint-ray-{os.getpid()}"
    try:
        subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a network namespace takes root and iproute2: {getattr(error, 'stderr', None) or error}")
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
    """A head on loopback with the dashboard's whole Job API; `token` None leaves it open to everybody."""
    # short: the sockets below it may have 107 characters
    folder = Path(tempfile.mkdtemp(prefix="mr", dir="/tmp"))
    port, dashboard, client = port or free_port(), free_port(), free_port()
    told = os.environ | environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    told["RAY_agent_register_timeout_ms"] = str(START_SECONDS * 1000)
    told["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{told['PATH']}"
    told |= {"RAY_AUTH_MODE": "disabled"} if token is None else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    # drivers of the head's own jobs are told where it is
    told.pop("RAY_ADDRESS", None)
    head = Head(port, f"http://127.0.0.1:{dashboard}", told, folder, ip=ip, within=within)
    start = [
        "start", "--head", f"--node-ip-address={ip}", f"--port={port}", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", *_agent_ports(),
        f"--temp-dir={folder}", "--num-cpus=2", "--object-store-memory=100000000", "--disable-usage-stats", *options,
    ]  # fmt: skip
    try:
        with _running(start, told, folder / "head.log", within), head.stack:
            yield head
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a head or a machine as a power cut does: SIGKILL to each of its processes."""
    if process.poll() is not None:
        return
    # it first: it would end the others politely
    everything = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in everything:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    psutil.wait_procs(everything[1:], timeout=10)


@contextmanager
def _running(
    arguments: list[str], environment: Mapping[str, str], log: Path, within: Sequence[str]
) -> Iterator[subprocess.Popen[bytes]]:
    # in the foreground, its processes are children of ours
    command = [*within, sys.executable, "-c", "from ray.scripts.scripts import main; main()", *arguments, "--block"]
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=dict(environment), stdout=out, stderr=out)
    try:
        _wait(process, log)
        yield process
    finally:
        kill(process)


def _wait(process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while "Ray runtime started" not in log.read_text():
        if time.monotonic() > until or process.poll() is not None:
            raise RuntimeError(f"it did not come up: {log.read_text()[-2000:]}")
        time.sleep(0.25)


def _agent_ports() -> list[str]:
    # told, or the raylet waits for its agents to find some, and gives up on a busy machine
    names = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export")
    return [f"--{name}-port={free_port()}" for name in names]


def free_port() -> int:
    """A port that nobody listens on, just now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
