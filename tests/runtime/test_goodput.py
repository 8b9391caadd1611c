"""Resource accounting against sums worked out by hand, and the journal of an attempt."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mint_ray.runtime import goodput
from mint_ray.runtime.goodput import (
    Attempt,
    Goodput,
    ResourceSeconds,
    WorkerPool,
    WorkerUsage,
    measure_goodput,
    process_started_at,
    read_attempts,
    record_attempt,
    record_pool,
    sum_attempts,
)


def cpu(seconds: float) -> ResourceSeconds:
    return ResourceSeconds(cpu_seconds=pytest.approx(seconds))


def attempt(*pools: WorkerPool, updated_at: float = 100.0, has_published: bool = True) -> Attempt:
    return Attempt(
        started_at=0.0, updated_at=updated_at, is_finished=has_published, has_published=has_published, pools=list(pools)
    )


def test_workers_are_allocated_from_their_start_to_the_release_of_the_pool() -> None:
    # requested at 10; one worker from 14, another from 20; both until 100
    pool = WorkerPool(
        cpus=2, gpus=0.5, max_workers=2, is_durable=True, requested_at=10, released_at=100,
        workers={
            "a": WorkerUsage(started_at=14, reported_at=98, startup=6, productive=70),
            "b": WorkerUsage(started_at=20, reported_at=95, startup=10, productive=50),
        },
    )  # fmt: skip
    # 86 + 80 seconds allocated; 16 start-up, 120 productive, 30 idle; times two CPUs and half a GPU
    assert sum_attempts([attempt(pool)]) == Goodput(
        attempts=1,
        wall_seconds=100,
        waiting_seconds=4,
        allocated=ResourceSeconds(cpu_seconds=332, gpu_seconds=83),
        startup=ResourceSeconds(cpu_seconds=32, gpu_seconds=8),
        productive=ResourceSeconds(cpu_seconds=240, gpu_seconds=60),
        lost=ResourceSeconds(),
        idle=ResourceSeconds(cpu_seconds=60, gpu_seconds=15),
    )


def test_a_replaced_worker_has_lost_the_time_since_its_last_report() -> None:
    # a reported last at 40; c started at 55 in a pool of two: 15 seconds are lost
    pool = WorkerPool(
        cpus=1, gpus=0, max_workers=2, is_durable=True, requested_at=0, released_at=100,
        workers={
            "a": WorkerUsage(started_at=0, reported_at=40, startup=5, productive=35),
            "b": WorkerUsage(started_at=0, reported_at=100, startup=5, productive=90),
            "c": WorkerUsage(started_at=55, reported_at=99, startup=5, productive=39),
        },
    )  # fmt: skip
    found = sum_attempts([attempt(pool)])
    assert (found.allocated, found.startup, found.productive) == (cpu(55 + 100 + 45), cpu(15), cpu(164))
    assert (found.lost, found.idle) == (cpu(15), cpu(5 + 1))


def test_after_a_driver_failure_durable_work_is_productive_and_other_work_lost() -> None:
    # the release of the workers was not recorded: they are counted up to the last write of the journal
    workers = {"a": WorkerUsage(started_at=2, reported_at=30, startup=8, productive=20)}
    durable = WorkerPool(cpus=1, gpus=0, max_workers=1, is_durable=True, requested_at=2, workers=workers)
    kept = sum_attempts([attempt(durable, updated_at=45, has_published=False)])
    assert (kept.wall_seconds, kept.allocated, kept.startup) == (45, cpu(43), cpu(8))
    assert (kept.productive, kept.lost, kept.idle) == (cpu(20), cpu(15), cpu(0))

    tasks = WorkerPool(cpus=1, gpus=0, max_workers=None, is_durable=False, requested_at=2, workers=workers)
    lost = sum_attempts([attempt(tasks, updated_at=45, has_published=False)])
    # tasks have nothing allocated between two reports
    assert (lost.allocated, lost.startup, lost.productive, lost.lost) == (cpu(28), cpu(8), cpu(0), cpu(20))

    pool = WorkerPool(cpus=1, gpus=0, max_workers=1, is_durable=True, requested_at=0, released_at=9)
    pool.workers["b"] = WorkerUsage(started_at=1, reported_at=9)
    both = sum_attempts([attempt(durable, updated_at=45, has_published=False), attempt(pool)])
    assert (both.attempts, both.wall_seconds, both.allocated) == (2, 145, cpu(43 + 8))


def test_workers_that_never_started_are_waited_for_and_cost_nothing() -> None:
    pool = WorkerPool(cpus=4, gpus=1, max_workers=2, is_durable=True, requested_at=10, released_at=70)
    found = sum_attempts([attempt(pool)])
    assert (found.waiting_seconds, found.allocated) == (60, ResourceSeconds())


def test_a_lost_worker_is_not_allocated_any_more() -> None:
    pool = WorkerPool(cpus=1, gpus=0, max_workers=2, is_durable=True, requested_at=0, released_at=100)
    pool.report("a", started_at=10, at=20, startup=10)
    pool.report("a", started_at=10, at=50, productive=30)
    pool.report("b", started_at=10, at=50, startup=10, productive=30)
    for worker in ("a", "b"):
        pool.mark_lost(worker, 60)
    pool.report("c", started_at=60, at=95, startup=5, productive=20, lost=10)
    found = sum_attempts([attempt(pool)])
    assert (found.allocated, found.startup, found.productive) == (cpu(50 + 50 + 40), cpu(25), cpu(80))
    # ten seconds of each lost worker, and the work that the third one repeated
    assert (found.lost, found.idle) == (cpu(10 + 10 + 10), cpu(5))


def test_a_journal_has_the_pools_of_its_attempt(tmp_path: Path) -> None:
    root = str(tmp_path)
    with (
        record_attempt(root, "answer-2") as attempt,
        record_pool(3.0, 0.0, max_workers=None, is_durable=True) as pool,
    ):
        pool.report("tasks", started_at=time.time(), at=time.time(), productive=2.0)
        attempt.has_published = True
    found = measure_goodput(root, "answer-2")
    assert (found.attempts, found.productive) == (1, cpu(6))
    (recorded,) = read_attempts(root, "answer-2")
    assert recorded.is_finished
    assert recorded.has_published
    # a pool outside any attempt is recorded nowhere
    with record_pool(1.0, 0.0, max_workers=1, is_durable=True) as unrecorded:
        pass
    assert unrecorded.released_at is not None
    assert len(list((tmp_path / "journal").rglob("*.json"))) == 1


def test_the_last_step_of_earlier_attempts_is_read_from_their_journals(tmp_path: Path) -> None:
    assert goodput.last_step_of_earlier_attempts() == 0
    for step in (7, 5):
        with record_attempt(str(tmp_path), "train-1"), record_pool(1, 0, max_workers=1, is_durable=True) as pool:
            pool.max_step = step
    with record_attempt(str(tmp_path), "train-1"):
        assert goodput.last_step_of_earlier_attempts() == 7


def test_an_attempt_whose_process_is_killed_is_counted(tmp_path: Path) -> None:
    code = f"""
import time
from mint_ray.runtime import goodput
goodput.WRITE_INTERVAL_SECONDS = 0.05
pool = goodput.record_pool(1.0, 0.0, max_workers=1, is_durable=True)
with goodput.record_attempt({str(tmp_path)!r}, "score-1"), pool as pool:
    pool.report("a", started_at=time.time() - 7, at=time.time(), startup=2.0, productive=5.0)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ))
    until = time.monotonic() + 60
    while not any(found.pools and found.pools[0].workers for found in read_attempts(str(tmp_path), "score-1")):
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (found,) = read_attempts(str(tmp_path), "score-1")
    assert not found.is_finished
    assert not found.has_published
    assert measure_goodput(str(tmp_path), "score-1").productive == cpu(5)


def test_a_journal_that_cannot_be_read_or_written_does_not_end_the_run(tmp_path: Path) -> None:
    broken = tmp_path / goodput.JOURNAL / "score-1"
    broken.mkdir(parents=True)
    (broken / "x.json").write_text('{"started_at": 1')
    (broken / "y.json").write_text(json.dumps({"started_at": "yesterday", "updated_at": 2.0}))
    assert measure_goodput(str(tmp_path), "score-1") == Goodput()
    (tmp_path / "file").write_text("")
    with record_attempt(str(tmp_path / "file"), "score-1"):
        pass


def test_the_start_of_this_process_is_known() -> None:
    assert process_started_at() == pytest.approx(psutil.Process().create_time(), abs=2)
