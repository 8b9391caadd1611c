"""Fault injection without a cluster; tests/remote/test_chaos.py injects faults into one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mint_ray.config.loader import UserError
from mint_ray.remote.chaos import check_root
from mint_ray.remote.chaos_agent import FaultInjector, _may_set_routes, _storage_host
from tests.cluster_heads import isolated_network

STORAGE, NODE = "10.77.0.2", "10.77.0.1"
CUT = """
from mint_ray.remote.chaos_agent import FaultInjector
print(FaultInjector().cut_storage("s3://mint/run", {seconds}, ["{node}"], {dry_run}))
"""
CONNECT = f"import socket; socket.create_connection(('{STORAGE}', 9000), timeout=1)"


@pytest.mark.parametrize(
    ("root", "variables", "expected"),
    [
        ("s3://mint/run", {"AWS_DEFAULT_REGION": "eu-west-1"}, "mint.s3.eu-west-1.amazonaws.com"),
        ("s3://mint/run", {"AWS_ENDPOINT_URL": "https://store.example.com:9000"}, "store.example.com"),
        ("gs://mint/run", {"AWS_ENDPOINT_URL": "https://store.example.com:9000"}, "storage.googleapis.com"),
    ],
)
def test_the_storage_host_follows_the_environment(
    root: str, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert _storage_host(root) == expected


@pytest.mark.parametrize("root", [None, "out", "/mnt/out", "file:///mnt/out"])
def test_a_local_disk_is_never_cut_off(root: str | None) -> None:
    with pytest.raises(UserError, match="cut-storage requires s3:// or gs://"):
        check_root(root)


def test_a_process_that_is_not_a_worker_of_the_node_is_not_killed() -> None:
    # a child of this process, not of this process's parent
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with pytest.raises(LookupError, match=f"process {other.pid} is not a worker"):
            FaultInjector().kill_worker(other.pid)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
    with pytest.raises(LookupError, match="not a worker"):
        FaultInjector().kill_worker(other.pid)


@pytest.mark.parametrize(("host", "nodes"), [("127.0.0.1", []), ("10.1.2.3", ["10.1.2.4", "10.1.2.3"])])
def test_a_node_of_the_cluster_is_never_cut_off(host: str, nodes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:9000")
    refused = "more than storage would be cut off" if _may_set_routes() else "require iproute2 and CAP_NET_ADMIN"
    with pytest.raises(RuntimeError, match=refused):
        FaultInjector().cut_storage("s3://mint/run", 1, nodes, dry_run=False)


@contextmanager
def storage_beside(within: tuple[str, ...]) -> Iterator[str]:
    """Start a server in a network namespace that is linked to the one of `within`; yield its endpoint."""
    node, storage = within[-1], f"{within[-1]}-s"
    try:
        for command in (
            ["ip", "netns", "add", storage],
            ["ip", "-n", node, "link", "add", "to-s", "type", "veth", "peer", "name", "to-us", "netns", storage],
            ["ip", "-n", node, "addr", "add", f"{NODE}/24", "dev", "to-s"],
            ["ip", "-n", storage, "addr", "add", f"{STORAGE}/24", "dev", "to-us"],
            ["ip", "-n", node, "link", "set", "to-s", "up"],
            ["ip", "-n", storage, "link", "set", "to-us", "up"],
        ):
            subprocess.run(command, check=True)
        serve = ["ip", "netns", "exec", storage, sys.executable, "-m", "http.server", "9000", "--bind", STORAGE]
        server = subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield f"http://{STORAGE}:9000"
        finally:
            server.kill()
            server.wait()
    finally:
        subprocess.run(["ip", "netns", "delete", storage], check=True)


def test_storage_is_cut_off_for_the_given_time_and_then_reachable_again() -> None:
    with isolated_network() as within, storage_beside(within) as endpoint:

        def is_reachable() -> bool:
            return subprocess.run([*within, sys.executable, "-c", CONNECT], capture_output=True).returncode == 0

        def cut(seconds: int, dry_run: bool) -> str:
            code = CUT.format(seconds=seconds, node=NODE, dry_run=dry_run)
            environment = os.environ | {"AWS_ENDPOINT_URL": endpoint}
            done = subprocess.run(
                [*within, sys.executable, "-c", code], capture_output=True, text=True, env=environment
            )
            assert done.returncode == 0, done.stderr
            return done.stdout.strip()

        deadline = time.monotonic() + 60
        while not is_reachable():
            assert time.monotonic() < deadline, "the server does not start"
        assert cut(20, dry_run=True) == f"['{STORAGE}']"
        assert is_reachable()
        # the process that injects the fault has exited by the time the routes are removed
        assert cut(20, dry_run=False) == f"['{STORAGE}']"
        assert not is_reachable()
        while not is_reachable():
            assert time.monotonic() < deadline + 60, "storage does not become reachable again"
