"""What is hit and what never is, without a cluster; tests/cluster/test_chaos.py hits one."""

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
from mint_ray.remote.chaos_agent import Hand, _host, _may_set_routes
from tests.cluster_heads import lonely_network

BEHIND, BEFORE = "10.77.0.2", "10.77.0.1"
CUT = """
from mint_ray.remote.chaos_agent import Hand
print(Hand().cut("s3://mint/run", {seconds}, ["{ours}"], {dry_run}))
"""
CONNECT = f"import socket; socket.create_connection(('{BEHIND}', 9000), timeout=1)"


@pytest.mark.parametrize(
    ("root", "told", "expected"),
    [
        ("s3://mint/run", {"AWS_DEFAULT_REGION": "eu-west-1"}, "mint.s3.eu-west-1.amazonaws.com"),
        ("s3://mint/run", {"AWS_ENDPOINT_URL": "https://store.example.com:9000"}, "store.example.com"),
        ("gs://mint/run", {"AWS_ENDPOINT_URL": "https://store.example.com:9000"}, "storage.googleapis.com"),
    ],
)
def test_storage_is_whoever_serves_the_bucket(
    root: str, told: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert _host(root) == expected


@pytest.mark.parametrize("root", [None, "out", "/mnt/out", "file:///mnt/out"])
def test_a_disk_is_never_cut(root: str | None) -> None:
    with pytest.raises(UserError, match="cut-storage takes s3:// or gs://"):
        check_root(root)


def test_a_process_that_is_no_worker_of_the_machine_is_spared() -> None:
    # a child of ours, whose parent is not ours
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with pytest.raises(LookupError, match=f"process {other.pid} is no worker"):
            Hand().kill_worker(other.pid)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
    with pytest.raises(LookupError, match="no worker"):
        Hand().kill_worker(other.pid)


@pytest.mark.parametrize(("host", "machines"), [("127.0.0.1", []), ("10.1.2.3", ["10.1.2.4", "10.1.2.3"])])
def test_a_machine_of_the_cluster_is_never_cut_off(
    host: str, machines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:9000")
    refused = "more than storage would be cut" if _may_set_routes() else "that takes iproute2 and CAP_NET_ADMIN"
    with pytest.raises(RuntimeError, match=refused):
        Hand().cut("s3://mint/run", 1, machines, dry_run=False)


@contextmanager
def storage_behind(within: tuple[str, ...]) -> Iterator[str]:
    """A server in a network of its own that the one of `within` reaches; its endpoint."""
    ours, name = within[-1], f"{within[-1]}-s"
    try:
        for command in (
            ["ip", "netns", "add", name],
            ["ip", "-n", ours, "link", "add", "to-s", "type", "veth", "peer", "name", "to-us", "netns", name],
            ["ip", "-n", ours, "addr", "add", f"{BEFORE}/24", "dev", "to-s"],
            ["ip", "-n", name, "addr", "add", f"{BEHIND}/24", "dev", "to-us"],
            ["ip", "-n", ours, "link", "set", "to-s", "up"],
            ["ip", "-n", name, "link", "set", "to-us", "up"],
        ):
            subprocess.run(command, check=True)
        serve = ["ip", "netns", "exec", name, sys.executable, "-m", "http.server", "9000", "--bind", BEHIND]
        server = subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield f"http://{BEHIND}:9000"
        finally:
            server.kill()
            server.wait()
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


def test_storage_is_cut_for_so_long_and_is_then_there_again() -> None:
    with lonely_network() as within, storage_behind(within) as endpoint:

        def reached() -> bool:
            return subprocess.run([*within, sys.executable, "-c", CONNECT], capture_output=True).returncode == 0

        def cut(seconds: int, dry_run: bool) -> str:
            code = CUT.format(seconds=seconds, ours=BEFORE, dry_run=dry_run)
            told = os.environ | {"AWS_ENDPOINT_URL": endpoint}
            done = subprocess.run([*within, sys.executable, "-c", code], capture_output=True, text=True, env=told)
            assert done.returncode == 0, done.stderr
            return done.stdout.strip()

        until = time.monotonic() + 60
        while not reached():
            assert time.monotonic() < until, "the server does not come up"
        assert cut(20, dry_run=True) == f"['{BEHIND}']"
        assert reached()
        # whoever cut it is gone meanwhile
        assert cut(20, dry_run=False) == f"['{BEHIND}']"
        assert not reached()
        while not reached():
            assert time.monotonic() < until + 60, "storage does not come back"
