"""Blocks go through actors or tasks in order, and what the user can mend comes back in one line."""

from __future__ import annotations

import itertools
import re
import time
from pathlib import Path

import pyarrow as pa
import pytest
import ray
import ray.data

from mint_ray.config.loader import UserError
from mint_ray.runtime import map_parts
from mint_ray.runtime import session as ray_session
from mint_ray.runtime.goodput import keep_journal, measure_goodput
from mint_ray.runtime.map_parts import Ahead, map_blocks

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

BLOCKS = [pa.table({"number": [2 * block, 2 * block + 1]}) for block in range(4)]
POOLS = pytest.mark.parametrize("actors", [None, (1, 1), (3, 3), (1, 9)], ids=["tasks", "one", "too many", "growing"])


class Doubles:
    """Doubles numbers, but for the one that it was told to refuse; -1 is itself."""

    def __init__(self, refused: int) -> None:
        if refused == -1:
            raise UserError("student: no weights")
        self.refused = refused

    def __call__(self, batch: pa.Table) -> pa.Table:
        numbers = batch["number"].to_pylist()
        if self.refused in numbers:
            raise UserError(f"record {self.refused}: is refused")
        return pa.table({"doubled": [2 * number for number in numbers]})


@POOLS
def test_blocks_come_back_in_order_however_many_processors_there_are(actors: tuple[int, int] | None) -> None:
    # two processors, and each actor takes both
    mapped = map_blocks(BLOCKS, Doubles, (99,), actors=actors, cpus=2, gpus=0)
    assert [block["doubled"].to_pylist() for block in mapped] == [[0, 2], [4, 6], [8, 10], [12, 14]]


@pytest.mark.parametrize(("refused", "message"), [(5, "record 5: is refused"), (-1, "student: no weights")])
@pytest.mark.parametrize("actors", [None, (1, 2)], ids=["tasks", "actors"])
def test_a_user_error_on_a_worker_is_the_same_here(actors: tuple[int, int] | None, refused: int, message: str) -> None:
    with pytest.raises(UserError) as caught:
        list(map_blocks(BLOCKS, Doubles, (refused,), actors=actors, cpus=1, gpus=0))
    assert type(caught.value) is UserError
    assert str(caught.value) == message


class Fills:
    """Makes two megabytes of each number, at once, and notes it; refuses 13."""

    def __init__(self, notes: str) -> None:
        self.notes = notes

    def __call__(self, batch: pa.Table) -> pa.Table:
        [number] = batch["number"].to_pylist()
        if number == 13:
            raise UserError("record 13: brings bad luck")
        with open(self.notes, "a") as stream:
            stream.write("made\n")
        return batch.append_column("filling", pa.array([bytes(2 << 20)], pa.large_binary()))


class Tastes:
    """Takes its time over each."""

    def __init__(self, notes: str) -> None:
        self.notes = notes

    def __call__(self, batch: pa.Table) -> pa.Table:
        time.sleep(0.1)
        with open(self.notes, "a") as stream:
            stream.write("eaten\n")
        return batch.select(["number"])


def test_what_is_made_ahead_waits_for_slow_actors_and_keeps_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, notes = [pa.table({"number": [100 + block]}) for block in range(24)], str(tmp_path / "notes")
    store = ray.cluster_resources()["object_store_memory"]
    context = ray.data.DataContext.get_current()
    monkeypatch.setattr(context, "override_object_store_memory_limit_fraction", (20 << 20) / store)
    ahead = Ahead(worker=Fills, arguments=(notes,), cpus=0.5, memory=1 << 20, tasks=2)
    mapped = map_blocks(blocks, Tastes, (notes,), actors=(1, 1), cpus=1, gpus=0, ahead=ahead)
    assert [block["number"].to_pylist() for block in mapped] == [[100 + block] for block in range(24)]
    steps = [1 if line == "made" else -1 for line in Path(notes).read_text().split()]
    assert (len(steps), sum(steps)) == (48, 0)
    # 20 MB were granted: ten at most wait or are at work, not all of them
    assert max(itertools.accumulate(steps)) <= 12


def test_a_user_error_ahead_of_the_actors_is_the_same_here(tmp_path: Path) -> None:
    ahead = Ahead(worker=Fills, arguments=(str(tmp_path / "notes"),), cpus=0.5, memory=1 << 20, tasks=2)
    with pytest.raises(UserError) as caught:
        list(map_blocks([pa.table({"number": [13]})], Doubles, (99,), actors=(1, 1), cpus=1, gpus=0, ahead=ahead))
    assert str(caught.value) == "record 13: brings bad luck"


def test_a_plan_that_the_cluster_cannot_hold_is_told(caplog: pytest.LogCaptureFixture) -> None:
    ray_session.tell_what_lacks({"CPU": 0.5, "GPU": 0})
    assert caplog.text == ""
    ray_session.tell_what_lacks({"CPU": 10_000.5, "GPU": 10_000})
    assert "nothing is done yet" in caplog.text
    assert "of 10000.5" in caplog.text
    assert re.search(r"GPU \d+ of 10000;", caplog.text)


def test_the_driver_holds_no_more_blocks_than_the_pool_needs() -> None:
    """However many parts there are: 100 for each actor at most, and one for each of a few."""
    assert [
        map_parts.parts_together(parts, actors) for parts, actors in ((1, 1), (100, 1), (101, 1), (1000, 1), (1000, 8))
    ] == [1, 1, 2, 10, 2]


class Slow:
    """Takes its time to come up, and over each block."""

    def __init__(self) -> None:
        time.sleep(0.5)

    def __call__(self, batch: pa.Table) -> pa.Table:
        time.sleep(0.25)
        return batch


@pytest.mark.parametrize("actors", [None, (1, 1)], ids=["tasks", "one"])
def test_a_block_may_take_longer_than_ray_data_waits_for_one(
    actors: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray.data.DataContext.get_current(), "execution_no_progress_timeout_s", 0.1)
    assert len(list(map_blocks(BLOCKS[:1], Slow, (), actors=actors, cpus=1, gpus=0))) == 1


@pytest.mark.parametrize("actors", [None, (1, 1)], ids=["tasks", "one"])
def test_the_attempt_is_told_what_the_workers_held(actors: tuple[int, int] | None, tmp_path: Path) -> None:
    with keep_journal(str(tmp_path), "score-1") as attempt:
        batches = list(map_blocks(BLOCKS, Slow, (), actors=actors, cpus=1, gpus=0, keeps=True))
        attempt.published = True
    assert [batch.column_names for batch in batches] == [["number"]] * len(BLOCKS)
    (pool,) = attempt.pools
    (lease,) = pool.leases.values()
    assert lease.work >= 0.25 * len(BLOCKS)
    assert lease.startup >= 0.5 * (1 if actors else len(BLOCKS))
    assert pool.until is not None
    assert lease.seen <= pool.until
    found = measure_goodput(str(tmp_path), "score-1")
    assert found.work.cpu_seconds == pytest.approx(lease.work)
    if actors:
        # one worker has held one processor, and no more, while it was there
        assert found.rented.cpu_seconds <= found.wall_seconds
