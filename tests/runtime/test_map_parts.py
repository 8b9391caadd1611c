"""Blocks and parts go through actors or tasks in order, each once; a worker's UserError is raised on the driver."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pyarrow as pa
import pytest
import ray
import ray.data

from mint_ray.artifacts import Artifact, PartResult, open_artifact
from mint_ray.config.loader import UserError
from mint_ray.records import Label
from mint_ray.runtime import map_parts as module
from mint_ray.runtime.goodput import measure_goodput, record_attempt
from mint_ray.runtime.map_parts import Part, Preprocessing, Workers, map_blocks, map_parts

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

BLOCKS = [pa.table({"number": [2 * block, 2 * block + 1]}) for block in range(4)]
POOLS = pytest.mark.parametrize("actors", [None, (1, 1), (3, 3), (1, 9)], ids=["tasks", "one", "too many", "growing"])


class Doubler:
    """Worker that doubles numbers, except `refused`; with -1 it refuses to start."""

    def __init__(self, refused: int) -> None:
        if refused == -1:
            raise UserError("student: no weights")
        self.refused = refused

    def __call__(self, block: pa.Table) -> pa.Table:
        numbers = block["number"].to_pylist()
        if self.refused in numbers:
            raise UserError(f"record {self.refused}: refused")
        return pa.table({"doubled": [2 * number for number in numbers]})


@POOLS
def test_blocks_come_back_in_order_for_any_number_of_cpus(actors: tuple[int, int] | None) -> None:
    # two CPUs, and each actor takes both
    mapped = map_blocks(BLOCKS, Workers(worker=Doubler, arguments=(99,), actors=actors, cpus=2))
    assert [block.to_pydict() for block in mapped] == [
        {"doubled": [0, 2]}, {"doubled": [4, 6]}, {"doubled": [8, 10]}, {"doubled": [12, 14]},
    ]  # fmt: skip


@pytest.mark.parametrize(("refused", "message"), [(5, "record 5: refused"), (-1, "student: no weights")])
@pytest.mark.parametrize("actors", [None, (1, 2)], ids=["tasks", "actors"])
def test_a_user_error_of_a_worker_is_raised_here_with_its_message(
    actors: tuple[int, int] | None, refused: int, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        list(map_blocks(BLOCKS, Workers(worker=Doubler, arguments=(refused,), actors=actors)))
    assert type(caught.value) is UserError
    assert str(caught.value) == message


class EvenNumbers:
    """Worker whose result can be a block without rows."""

    def __call__(self, block: pa.Table) -> pa.Table:
        return pa.table({"even": pa.array([n for n in block["number"].to_pylist() if n in (0, 6)], pa.int64())})


@pytest.mark.parametrize("actors", [None, (1, 1)], ids=["tasks", "one"])
def test_results_without_rows_are_allowed(actors: tuple[int, int] | None) -> None:
    mapped = map_blocks(BLOCKS, Workers(worker=EvenNumbers, actors=actors))
    assert [number for block in mapped for number in block["even"].to_pylist()] == [0, 6]


class Filler:
    """Preprocessing that makes two megabytes of each number and logs it to a file; it refuses 13."""

    def __init__(self, log: str) -> None:
        self.log = log

    def __call__(self, block: pa.Table) -> pa.Table:
        [number] = block["number"].to_pylist()
        if number == 13:
            raise UserError("record 13: refused")
        with open(self.log, "a") as stream:
            stream.write("made\n")
        return block.append_column("filling", pa.array([bytes(2 << 20)], pa.large_binary()))


class SlowConsumer:
    """Worker that takes 0.1 s per block and logs it to a file."""

    def __init__(self, log: str) -> None:
        self.log = log

    def __call__(self, block: pa.Table) -> pa.Table:
        time.sleep(0.1)
        with open(self.log, "a") as stream:
            stream.write("consumed\n")
        return block.select(["number"])


def filling(log: str) -> Preprocessing:
    return Preprocessing(worker=Filler, arguments=(log,), cpus=0.5, memory=1 << 20, max_tasks=2)


def test_preprocessing_waits_for_slow_actors_and_keeps_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, log = [pa.table({"number": [100 + block]}) for block in range(24)], str(tmp_path / "log")
    store = ray.cluster_resources()["object_store_memory"]
    context = ray.data.DataContext.get_current()
    monkeypatch.setattr(context, "override_object_store_memory_limit_fraction", (20 << 20) / store)
    workers = Workers(worker=SlowConsumer, arguments=(log,), actors=(1, 1))
    mapped = map_blocks(blocks, workers, preprocessing=filling(log))
    assert [block["number"].to_pylist() for block in mapped] == [[100 + block] for block in range(24)]
    steps = [1 if line == "made" else -1 for line in Path(log).read_text().split()]
    assert (len(steps), sum(steps)) == (48, 0)
    # 20 MB were granted: at most ten blocks wait or are in progress, not all of them
    assert max(itertools.accumulate(steps)) <= 12


def test_a_user_error_of_the_preprocessing_is_raised_here_with_its_message(tmp_path: Path) -> None:
    workers = Workers(worker=Doubler, arguments=(99,), actors=(1, 1))
    with pytest.raises(UserError) as caught:
        list(map_blocks([pa.table({"number": [13]})], workers, preprocessing=filling(str(tmp_path / "log"))))
    assert str(caught.value) == "record 13: refused"


def test_the_number_of_blocks_is_bounded_by_the_number_of_actors() -> None:
    """At most 100 blocks per actor, however many parts there are."""
    assert [
        module.parts_per_block(parts, actors) for parts, actors in ((1, 1), (100, 1), (101, 1), (1000, 1), (1000, 8))
    ] == [1, 1, 2, 10, 2]


class SlowWorker:
    """Worker that takes 0.5 s to start and 0.25 s per block."""

    def __init__(self) -> None:
        time.sleep(0.5)

    def __call__(self, block: pa.Table) -> pa.Table:
        time.sleep(0.25)
        return block


@pytest.mark.parametrize("actors", [None, (1, 1)], ids=["tasks", "one"])
def test_a_block_may_take_longer_than_the_timeout_of_ray_data(
    actors: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray.data.DataContext.get_current(), "execution_no_progress_timeout_s", 0.1)
    assert len(list(map_blocks(BLOCKS[:1], Workers(worker=SlowWorker, actors=actors)))) == 1


@pytest.mark.parametrize("actors", [None, (1, 1)], ids=["tasks", "one"])
def test_the_resources_of_the_workers_are_accounted(actors: tuple[int, int] | None, tmp_path: Path) -> None:
    with record_attempt(str(tmp_path), "score-1") as attempt:
        blocks = list(map_blocks(BLOCKS, Workers(worker=SlowWorker, actors=actors), is_durable=True))
        attempt.has_published = True
    assert [block.column_names for block in blocks] == [["number"]] * len(BLOCKS)
    (pool,) = attempt.pools
    (usage,) = pool.workers.values()
    assert usage.productive >= 0.25 * len(BLOCKS)
    assert usage.startup >= 0.5 * (1 if actors else len(BLOCKS))
    assert pool.released_at is not None
    assert usage.reported_at <= pool.released_at
    found = measure_goodput(str(tmp_path), "score-1")
    assert found.productive.cpu_seconds == pytest.approx(usage.productive)
    # a process that Ray started before is idle until its start; its start is counted once
    assert found.allocated.cpu_seconds <= (1 if actors else 2) * found.wall_seconds


class Writer:
    """Worker of `map_parts` that writes one label per part, and fails at the part `failing`."""

    def __init__(self, artifact: Artifact, failing: str, log: str) -> None:
        self.artifact, self.failing, self.log = artifact, failing, log

    def work(self, part: Part, preprocessed: pa.Table | None = None) -> PartResult:
        if part.path == self.failing:
            raise UserError(f"{part.path}: refused")
        with open(self.log, "a") as stream:
            stream.write(f"{part.path}\n")
        name = part.uri if preprocessed is None else preprocessed["name"][0].as_py()
        file = self.artifact.write_part(part.path, Label, [Label(label_id="a", name=name)])
        return PartResult(path=part.path, rows=1, files=[file], counts={"labels": 1}, dropped={"empty": 2})


class Namer:
    """Preprocessing of `map_parts`."""

    columns = pa.schema([("name", pa.string())])

    def work(self, part: Part) -> pa.Table:
        return pa.table({"name": [part.uri.upper()]}, schema=self.columns)


@pytest.mark.parametrize("is_preprocessed", [False, True])
def test_finished_parts_are_not_processed_again(tmp_path: Path, is_preprocessed: bool) -> None:
    artifact, log = open_artifact(str(tmp_path), "score", {}, {}), tmp_path / "log"
    parts = [Part(path=f"labels/part-{number}.parquet", uri=f"part {number}") for number in range(4)]
    preprocessing = Preprocessing(worker=Namer, cpus=0.5, memory=1 << 20, max_tasks=1) if is_preprocessed else None

    def run(failing: str) -> list[PartResult]:
        workers = Workers(worker=Writer, arguments=(artifact, failing, str(log)), actors=(1, 1))
        return list(map_parts(artifact, parts, PartResult, workers, preprocessing=preprocessing))

    with pytest.raises(UserError, match=r"part-3\.parquet: refused"):
        run(failing=parts[3].path)
    with artifact.write() as draft:
        results = run(failing="")
        for result in results:
            draft.add_part(result)
    assert [result.path for result in results] == [part.path for part in parts]
    assert sorted(log.read_text().split()) == [part.path for part in parts]
    names = [part.uri.upper() if is_preprocessed else part.uri for part in parts]
    assert [label.name for label in artifact.rows(Label, "labels")] == names
    assert (artifact.manifest.counts, artifact.manifest.dropped) == ({"labels": 4}, {"empty": 8})
