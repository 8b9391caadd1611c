"""Kill actors, machines and drivers of the score stage and let its storage fail: every record comes out once.

`MINT_RAY_HITS` says how often (6; the whole claim is 20), `MINT_RAY_SEED` with which seed.
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
HITS = int(os.environ.get("MINT_RAY_HITS", "6"))
SEED = int(os.environ.get("MINT_RAY_SEED") or time.time_ns() % 1_000_000)
KINDS = ("actor", "driver", "node", "storage")

# a machine that is lost is missed in seconds; Ray's defaults are meant for networks that pause
IMPATIENT = {
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


class Slowly(TeacherActor):
    """Takes its time, so that there is something to hit."""

    def work(self, part: RecordsPart) -> ScoredPart:
        time.sleep(float(os.environ["MINT_RAY_PAUSE"]))
        return super().work(part)


def score(root: str) -> Artifact:
    records, teacher = write_inputs(root, RECORDS, ROWS_PER_PART)
    config = Score(resources=ScoreResources(actors=2, cpus_per_actor=1))
    return score_records(root, config, RareDisease(), teacher, records)


class Run:
    """The stage in two machines that are processes here, with storage behind a proxy, and what can happen to it."""

    def __init__(self, folder: Path, root: str, proxy: FaultProxy, direct: s3fs.S3FileSystem) -> None:
        self.folder, self.root, self.proxy, self.direct = folder, root, proxy, direct
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "dashboard_host": "127.0.0.1"})
        self.other = self.cluster.add_node(num_cpus=1)
        self.drivers: list[subprocess.Popen[bytes]] = []
        self.done: Counter[str] = Counter()

    def start(self) -> None:
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
        """Parts with a completion record; asked past the proxy, whose faults are meant for others."""
        return sum(path.endswith(".json") for path in self.direct.find(f"{self.root}/{RUNS}"))

    def wait_for_work(self, draws: random.Random) -> None:
        """Until a few more parts are finished than now, and a random moment longer."""
        least, until = self.finished() + draws.randint(1, 4), time.monotonic() + 120
        while self.driver.poll() is None and self.finished() < least:
            assert time.monotonic() < until, f"nothing is finished any more: {self.log()[-4000:]}"
            time.sleep(0.1)
        time.sleep(draws.uniform(0, 0.5))

    def hit(self, kind: str, draws: random.Random) -> bool:
        """Whether there was something to hit."""
        if self.driver.poll() is not None:
            return False
        if kind == "actor":
            actors = teacher_actors()
            if not actors:
                return False
            draws.choice(actors).kill()
        elif kind == "driver":
            self.driver.kill()
            assert self.driver.wait() == -signal.SIGKILL
            self.start()
        elif kind == "node":
            self.cluster.remove_node(self.other, allow_graceful=False)
            self.other = self.cluster.add_node(num_cpus=1)
        else:
            self.proxy.arm(draws.choice(FAULTS), draws.randint(1, 4))
        self.done[kind] += 1
        return True

    def close(self) -> None:
        for driver in self.drivers:
            driver.kill()
            driver.wait()
        self.cluster.shutdown()


def teacher_actors() -> list[psutil.Process]:
    """Those of this test alone: other people's Rays run on the machine too."""
    mine = psutil.Process().children(recursive=True)
    return [process for process in mine if "MapWorker" in _title(process)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture
def run(s3_server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    proxy = FaultProxy(s3_server["AWS_ENDPOINT_URL"])
    behind = {"AWS_ENDPOINT_URL": proxy.endpoint, "MINT_RAY_PAUSE": "0.25"}
    for key, value in (s3_server | IMPATIENT | behind).items():
        monkeypatch.setenv(key, value)
    root = f"s3://{BUCKET}/faults"
    write_inputs(root, RECORDS, ROWS_PER_PART)
    direct = s3fs.S3FileSystem(
        key=s3_server["AWS_ACCESS_KEY_ID"],
        secret=s3_server["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=s3_server["AWS_ENDPOINT_URL"],
        use_listings_cache=False,
    )
    made = Run(tmp_path, root, proxy, direct)
    yield made
    made.close()
    proxy.close()


def kinds(draws: random.Random) -> list[str]:
    """As many of each, in any order."""
    wanted = (list(KINDS) * HITS)[:HITS]
    draws.shuffle(wanted)
    return wanted


def undisturbed(root: Path, disturbed: Artifact) -> list[File]:
    """The files as one process writes them that asks the teacher part by part, without Ray and without S3."""
    records, teacher = write_inputs(root, RECORDS, ROWS_PER_PART)
    artifact = open_artifact(str(root), "score", disturbed.config, disturbed.inputs)
    actor = TeacherActor(artifact, Score(), RareDisease(), teacher, records)
    paths = [
        (file.path.replace("records/", "scores/"), records.file_uri(file.path))
        for file in records.table_files("records")
    ]
    return [
        file
        for path, uri in paths
        for file in actor.work(RecordsPart(table="scores", path=path, uri=uri, without=None)).files
    ]


def test_every_record_comes_out_once_whatever_is_killed(run: Run, tmp_path: Path) -> None:
    draws, started = random.Random(SEED), time.monotonic()
    print(f"seed {SEED}, {HITS} hits")
    run.start()
    for kind in kinds(draws):
        run.wait_for_work(draws)
        assert run.hit(kind, draws), f"nothing left to hit after {dict(run.done)}: {run.log()[-4000:]}"
        print(f"{time.monotonic() - started:.1f} s, {run.finished()} parts: {kind}", flush=True)
    run.proxy.disarm()
    assert run.driver.wait(timeout=300) == 0, run.log()[-4000:]
    print(f"{time.monotonic() - started:.1f} s: {dict(run.done)}, storage {dict(run.proxy.suffered)}")

    found = made_of(run.root)
    assert verify(found.uri) == []
    assert found.manifest.files == undisturbed(tmp_path / "undisturbed", found)
    ids = [
        record_id
        for file in found.table_files("scores")
        for record_id in read_part(found.file_uri(file.path))["record_id"].to_pylist()
    ]
    assert ids == [f"r{number:05d}" for number in range(RECORDS)]
    assert run.finished() == 0


def made_of(root: str) -> Artifact:
    """The artifact of a run that is over: the stage finds it complete."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "_score", lambda *_: pytest.fail("the stage ran again"))
        return score(root)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    module.TeacherActor = Slowly  # type: ignore[misc]
    score(sys.argv[1])
