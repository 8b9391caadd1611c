"""Fixtures shared by all tests: an S3 server on loopback and a local Ray cluster.

The tests run in two processes (pytest-xdist). Each has its own Ray cluster and its own S3 server, started when the first
test needs them and ended with the process.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

# set before anything starts Ray, reads a hub or loads torch
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# a cluster of our own, whatever else runs on this machine
os.environ.setdefault("RAY_ADDRESS", "local")
# room for two clusters; the default is a third of the memory for each
os.environ.setdefault("RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES", str(1 << 30))
# more threads than cores make two test processes slower
os.environ.setdefault("OMP_NUM_THREADS", "1")

BUCKET = "mint"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start a SeaweedFS server with one bucket; yield the environment variables of its clients."""
    weed = shutil.which("weed")
    if weed is None:
        pytest.skip("no weed: install the extra `test`")
    folder = tmp_path_factory.mktemp("s3")
    identity = {"accessKey": "labkey", "secretKey": "labsecret123"}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    config = {"identities": [{"name": "lab", "credentials": [identity], "actions": actions}]}
    (folder / "s3.json").write_text(json.dumps(config))
    (folder / "data").mkdir()
    # each port also opens port + 10000
    master, volume, filer, s3 = (_free_port() for _ in range(4))
    command = [
        weed, "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-master.port={master}",
        f"-volume.port={volume}", "-filer", f"-filer.port={filer}", "-master.volumeSizeLimitMB=64", "-volume.max=20",
        "-master.telemetry=false", "-s3", f"-s3.port={s3}", "-s3.port.iceberg=0",
        "-s3.port.lance=0", f"-s3.config={folder / 's3.json'}",
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait(f"http://127.0.0.1:{s3}/healthz", server, folder / "log")
        environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3}",
            "AWS_ACCESS_KEY_ID": identity["accessKey"],
            "AWS_SECRET_ACCESS_KEY": identity["secretKey"],
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        _create_bucket(environment)
        yield environment
    finally:
        server.kill()  # its data is not needed, and a graceful shutdown takes half a minute
        server.wait()


@pytest.fixture
def s3_root(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Return the URI of an empty prefix in a real bucket, and set the environment variables to reach it."""
    for key, value in s3_server.items():
        monkeypatch.setenv(key, value)
    return f"s3://{BUCKET}/{request.node.name.split('[')[0]}"


@pytest.fixture(scope="session")
def _ray_shutdown() -> Iterator[None]:
    import ray

    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def ray_cluster(_ray_shutdown: None) -> None:
    """Connect to the local Ray cluster of this test process.

    A module that needs another cluster ends this one with `ray.shutdown()`; the next module starts a new one.
    """
    from mint_ray.runtime.session import connect

    connect()


def _create_bucket(environment: dict[str, str]) -> None:
    import s3fs

    s3fs.S3FileSystem(
        key=environment["AWS_ACCESS_KEY_ID"],
        secret=environment["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=environment["AWS_ENDPOINT_URL"],
    ).mkdir(BUCKET)


def _free_port() -> int:
    """Return a port that is free at this moment, as is the one 10,000 above it."""
    while True:
        with socket.socket() as low, socket.socket() as high:
            low.bind(("127.0.0.1", 0))
            port = int(low.getsockname()[1])
            if port > 50_000:
                continue
            try:
                high.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
            return port


def _wait(url: str, server: subprocess.Popen[bytes], log: Path, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=1):  # noqa: S310
                return
        except OSError:
            time.sleep(0.25)
    raise RuntimeError(f"the S3 server did not start: {log.read_text()[-2000:]}")
