"""Real parts for the tests: an S3 server on loopback and a local Ray cluster."""

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

# set before anything starts Ray or reads a hub
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# a Ray of our own, whatever else runs on this machine
os.environ.setdefault("RAY_ADDRESS", "local")

BUCKET = "mint"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A SeaweedFS server with one bucket; yields the environment that reaches it."""
    weed = shutil.which("weed")
    if weed is None:
        pytest.skip("no weed: the `test` extra brings it")
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
        server.kill()  # it has nothing to keep, and a polite end takes half a minute
        server.wait()


@pytest.fixture
def s3_root(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """An empty prefix in a real bucket, with the environment set to reach it."""
    for key, value in s3_server.items():
        monkeypatch.setenv(key, value)
    return f"s3://{BUCKET}/{request.node.name.split('[')[0]}"


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """Ray on this machine with two processors, ended after the module."""
    import ray

    from mint_ray.runtime.session import connect

    connect()
    yield
    ray.shutdown()


def _create_bucket(environment: dict[str, str]) -> None:
    import s3fs

    s3fs.S3FileSystem(
        key=environment["AWS_ACCESS_KEY_ID"],
        secret=environment["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=environment["AWS_ENDPOINT_URL"],
    ).mkdir(BUCKET)


def _free_port() -> int:
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
    raise RuntimeError(f"the S3 server did not come up: {log.read_text()[-2000:]}")
