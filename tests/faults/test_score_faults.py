"""Kill actors, nodes and drivers of the score stage and let its storage fail: every record is scored once.

`MINT_RAY_FAULTS` is the number of injected faults (default 6; the full test is 20), `MINT_RAY_SEED` their seed.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import s3fs
from ray.cluster_utils import Cluster

from mint_ray.artifacts import RUNS, Artifact, File, open_artifact, read_part, verify
from mint_ray.config.stages import Score, ScoreResources
from mint_ray.stages import score as module
from mint_ray.stages.score import RecordsPart, ScoredPart, TeacherActor, score_records
from mint_ray.tasks.config import RareDisease
from tests.conftest import BUCKET
from tests.faults.proxy import FAULTS, FaultProxy
from tests.stages.test_score import write_inputs

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.slow, pytest.mark.timeout(900)]

RECORDS, ROWS_PER_PART = 20_000, 100
NUM_FAULTS = int(os.environ.get("MINT_RAY_FAULTS", "6"))
SEED = int(os.environ.get("MINT_RAY_SEED") or time.time_ns() % 1_000_000)
KINDS = ("actor", "driver", "node", "storage")

# a node failure is detected within seconds; Ray's defaults allow for networks that pause
HEALTH_CHECKS = {
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


class SlowTeacherActor(TeacherActor):
    """A teacher that pauses before each part, so that faults meet work in progress."""

    def work(self, part: RecordsPart) -> ScoredPart:
        time.sleep(float(os.environ["MINT_RAY_PAUSE"]))
        return super().work(part)


def score(root: str) -> Artifact:
    records, teacher = write_inputs(root, RECORDS, ROWS_PER_PART)
    config = Score(resources=ScoreResources(actors=2, cpus_per_actor=1))
    return score_records(root, config, RareDisease(), teacher, records)


class Run:
    """The stage on two nodes that are processes here, with storage behind a proxy, and its faults."""

    def __init__(self, folder: Path, root: str, proxy: FaultProxy, direct: s3fs.S3FileSystem) -> None:
        self.folder, self.root, self.proxy, self.direct = folder, root, proxy, direct
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "dashboard_host": "127.0.0.1"})
        self.other = self.cluster.add_node(num_cpus=1)
        self.drivers: list[subprocess.Popen[bytes]] = []
        self.injected: Counter[str] = Counter()

    def start(self) -> None:
        """Start a driver."""
        command = [sys.executable, "-m", "tests.faults.test_score_faults", self.root]
        with (self.folder / f"driver-{len(self.drivers)}.log").open("wb") as log:
            environment = os.environ | {"RAY_ADDRESS": self.cluster.address}
            self.drivers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    @property
    def driver(self) -> subprocess.Popen[bytes]:
        return self.drivers[-1]

    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("driver-*.log")))

    def finished(self) -> int:
        """Return the number of parts with a completion record, without going through the proxy."""
        return sum(path.endswith(".json") for path in self.direct.find(f"{self.root}/{RUNS}"))

    def wait_for_work(self, rng: random.Random) -> None:
        """Wait until a few more parts are finished than now, and a random time longer."""
        wanted, until = self.finished() + rng.randint(1, 4), time.monotonic() + 120
        while self.driver.poll() is None and self.finished() < wanted:
            assert time.monotonic() < until, f"no progress: {self.log()[-4000:]}"
            time.sleep(0.1)
        time.sleep(rng.uniform(0, 0.5))

    def inject(self, kind: str, rng: random.Random) -> bool:
        """Inject a fault; return False if there was nothing to fail."""
        if self.driver.poll() is not None:
            return False
        if kind == "actor":
            actors = teacher_actors()
            if not actors:
                return False
            rng.choice(actors).kill()
        elif kind == "driver":
            self.driver.kill()
            assert self.driver.wait() == -signal.SIGKILL
            self.start()
        elif kind == "node":
            self.cluster.remove_node(self.other, allow_graceful=False)
            self.other = self.cluster.add_node(num_cpus=1)
        else:
            self.proxy.arm(rng.choice(FAULTS), rng.randint(1, 4))
        self.injected[kind] += 1
        return True

    def close(self) -> None:
        for driver in self.drivers:
            driver.kill()
            driver.wait()
        self.cluster.shutdown()


def teacher_actors() -> list[psutil.Process]:
    """Return the actors of this test; other Ray clusters may run on the machine."""
    children = psutil.Process().children(recursive=True)
    return [process for process in children if "MapWorker" in _title(process)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture
def run(s3_server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    proxy = FaultProxy(s3_server["AWS_ENDPOINT_URL"])
    environment = {"AWS_ENDPOINT_URL": proxy.endpoint, "MINT_RAY_PAUSE": "0.25"}
    for key, value in (s3_server | HEALTH_CHECKS | environment).items():
        monkeypatch.setenv(key, value)
    root = f"s3://{BUCKET}/faults"
    write_inputs(root, RECORDS, ROWS_PER_PART)
    direct = s3fs.S3FileSystem(
        key=s3_server["AWS_ACCESS_KEY_ID"],
        secret=s3_server["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=s3_server["AWS_ENDPOINT_URL"],
        use_listings_cache=False,
    )
    started = Run(tmp_path, root, proxy, direct)
    yield started
    started.close()
    proxy.close()


def choose_faults(rng: random.Random) -> list[str]:
    """Return equally many faults of each kind, in random order."""
    faults = (list(KINDS) * NUM_FAULTS)[:NUM_FAULTS]
    rng.shuffle(faults)
    return faults


def without_faults(root: Path, scored: Artifact) -> list[File]:
    """Return the files that one process writes, part by part, without Ray and without S3."""
    records, teacher = write_inputs(root, RECORDS, ROWS_PER_PART)
    artifact = open_artifact(str(root), "score", scored.config, scored.inputs)
    actor = TeacherActor(artifact, Score(), RareDisease(), teacher, records)
    paths = [
        (file.path.replace("records/", "scores/"), records.file_uri(file.path))
        for file in records.table_files("records")
    ]
    return [
        file
        for path, uri in paths
        for file in actor.work(RecordsPart(table="scores", path=path, uri=uri, ablated=None)).files
    ]


def test_every_record_is_scored_once_whatever_fails(run: Run, tmp_path: Path) -> None:
    rng, started = random.Random(SEED), time.monotonic()
    print(f"seed {SEED}, {NUM_FAULTS} faults")
    run.start()
    for kind in choose_faults(rng):
        run.wait_for_work(rng)
        assert run.inject(kind, rng), f"nothing left to fail after {dict(run.injected)}: {run.log()[-4000:]}"
        print(f"{time.monotonic() - started:.1f} s, {run.finished()} parts: {kind}", flush=True)
    run.proxy.disarm()
    assert run.driver.wait(timeout=300) == 0, run.log()[-4000:]
    print(f"{time.monotonic() - started:.1f} s: {dict(run.injected)}, storage {dict(run.proxy.injected)}")

    found = complete_artifact(run.root)
    assert verify(found.uri) == []
    assert found.manifest.files == without_faults(tmp_path / "without_faults", found)
    ids = [
        record_id
        for file in found.table_files("scores")
        for record_id in read_part(found.file_uri(file.path))["record_id"].to_pylist()
    ]
    assert ids == [f"r{number:05d}" for number in range(RECORDS)]
    assert run.finished() == 0


def complete_artifact(root: str) -> Artifact:
    """Return the artifact of a run that has ended: the stage finds it complete."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "_score", lambda *_: pytest.fail("the stage ran again"))
        return score(root)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    module.TeacherActor = SlowTeacherActor  # type: ignore[misc]
    score(sys.argv[1])
