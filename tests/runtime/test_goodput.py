"""What is rented, worked, redone and idle, against sums done by hand; and what a journal keeps of an attempt."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mint_ray.runtime import goodput
from mint_ray.runtime.goodput import (
    Amount,
    Attempt,
    Goodput,
    Lease,
    Pool,
    ask,
    keep_journal,
    measure_goodput,
    read_attempts,
    weigh,
)


def cpu(seconds: float) -> Amount:
    return Amount(cpu_seconds=pytest.approx(seconds))


def attempt(*pools: Pool, seen: float = 100.0, published: bool = True) -> Attempt:
    return Attempt(started=0.0, seen=seen, ended=published, published=published, pools=list(pools))


def test_a_pool_of_two_is_what_it_held_from_its_first_breath_to_its_end() -> None:
    # asked at 10; one worker from 14, another from 20; both until 100
    pool = Pool(
        cpus=2, gpus=0.5, most=2, keeps=True, asked=10, until=100,
        leases={
            "a": Lease(since=14, seen=98, startup=6, work=70),
            "b": Lease(since=20, seen=95, startup=10, work=50),
        },
    )  # fmt: skip
    # 86 + 80 seconds held; 16 start-up, 120 work, 30 neither; times two processors and half a GPU
    assert weigh([attempt(pool)]) == Goodput(
        attempts=1,
        wall_seconds=100,
        waited_seconds=4,
        rented=Amount(cpu_seconds=332, gpu_seconds=83),
        startup=Amount(cpu_seconds=32, gpu_seconds=8),
        work=Amount(cpu_seconds=240, gpu_seconds=60),
        redone=Amount(),
        idle=Amount(cpu_seconds=60, gpu_seconds=15),
    )


def test_a_worker_that_another_replaced_has_lost_what_it_did_not_tell() -> None:
    # a told last at 40; c came at 55 where only two can be: 15 seconds are lost
    pool = Pool(
        cpus=1, gpus=0, most=2, keeps=True, asked=0, until=100,
        leases={
            "a": Lease(since=0, seen=40, startup=5, work=35),
            "b": Lease(since=0, seen=100, startup=5, work=90),
            "c": Lease(since=55, seen=99, startup=5, work=39),
        },
    )  # fmt: skip
    found = weigh([attempt(pool)])
    assert (found.rented, found.startup, found.work) == (cpu(55 + 100 + 45), cpu(15), cpu(164))
    assert (found.redone, found.idle) == (cpu(15), cpu(5 + 1))


def test_of_a_driver_that_died_what_is_recorded_stays_work_and_what_is_not_is_redone() -> None:
    # nobody lived to say when the workers were given back: they are counted up to the journal's last word
    leases = {"a": Lease(since=2, seen=30, startup=8, work=20)}
    first = Pool(cpus=1, gpus=0, most=1, keeps=True, asked=2, leases=leases)
    kept = weigh([attempt(first, seen=45, published=False)])
    assert (kept.wall_seconds, kept.rented, kept.startup) == (45, cpu(43), cpu(8))
    assert (kept.work, kept.redone, kept.idle) == (cpu(20), cpu(15), cpu(0))

    second = Pool(cpus=1, gpus=0, most=None, keeps=False, asked=2, leases=leases)
    lost = weigh([attempt(second, seen=45, published=False)])
    # tasks hold nothing between what they tell
    assert (lost.rented, lost.startup, lost.work, lost.redone) == (cpu(28), cpu(8), cpu(0), cpu(20))

    again = attempt(Pool(cpus=1, gpus=0, most=1, keeps=True, asked=0, until=9, leases={"b": Lease(since=1, seen=9)}))
    both = weigh([attempt(first, seen=45, published=False), again])
    assert (both.attempts, both.wall_seconds, both.rented) == (2, 145, cpu(43 + 8))


def test_workers_that_never_came_are_waited_for_and_cost_nothing() -> None:
    found = weigh([attempt(Pool(cpus=4, gpus=1, most=2, keeps=True, asked=10, until=70))])
    assert (found.waited_seconds, found.rented) == (60, Amount())


def test_a_worker_that_is_known_to_be_lost_is_not_rented_any_more() -> None:
    pool = Pool(cpus=1, gpus=0, most=2, keeps=True, asked=0, until=100)
    pool.tell("a", since=10, at=20, startup=10)
    pool.tell("a", since=10, at=50, work=30)
    pool.tell("b", since=10, at=50, startup=10, work=30)
    for worker in ("a", "b"):
        pool.lose(worker, 60)
    pool.tell("c", since=60, at=95, startup=5, work=20, redone=10)
    found = weigh([attempt(pool)])
    assert (found.rented, found.startup, found.work) == (cpu(50 + 50 + 40), cpu(25), cpu(80))
    # ten seconds of each of the two that were lost, and what the third did again
    assert (found.redone, found.idle) == (cpu(10 + 10 + 10), cpu(5))


def test_a_journal_tells_of_what_was_asked_for_within_and_of_artifacts_made_on_the_way(tmp_path: Path) -> None:
    root = str(tmp_path)
    with keep_journal(root, "evaluate-1") as outer:
        with keep_journal(root, "answer-2") as inner, ask(3.0, 0.0, most=None, keeps=True) as pool:
            pool.tell("tasks", since=time.time(), at=time.time(), work=2.0)
            inner.published = True
        outer.published = True
    assert [found.within for found in read_attempts(root, "evaluate-1")] == [["answer-2"]]
    assert measure_goodput(root, "answer-2").work == cpu(6)
    whole = measure_goodput(root, "evaluate-1")
    assert (whole.attempts, whole.work) == (1, cpu(6))
    (told,) = read_attempts(root, "answer-2")
    assert told.ended
    assert told.published
    # a part of no artifact is nobody's
    with ask(1.0, 0.0, most=1, keeps=True) as loose:
        pass
    assert loose.until is not None
    assert len(list((tmp_path / "journal").rglob("*.json"))) == 2


def test_an_attempt_whose_process_is_killed_is_not_forgotten(tmp_path: Path) -> None:
    code = f"""
import time
from mint_ray.runtime import goodput
goodput.BEAT_SECONDS = 0.05
with goodput.keep_journal({str(tmp_path)!r}, "score-1"), goodput.ask(1.0, 0.0, most=1, keeps=True) as pool:
    pool.tell("a", since=time.time() - 7, at=time.time(), startup=2.0, work=5.0)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ))
    until = time.monotonic() + 60
    while not any(found.pools and found.pools[0].leases for found in read_attempts(str(tmp_path), "score-1")):
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (found,) = read_attempts(str(tmp_path), "score-1")
    assert not found.ended
    assert not found.published
    assert measure_goodput(str(tmp_path), "score-1").work == cpu(5)


def test_a_journal_that_cannot_be_read_or_written_costs_a_figure_and_no_run(tmp_path: Path) -> None:
    broken = tmp_path / goodput.JOURNAL / "score-1"
    broken.mkdir(parents=True)
    (broken / "x.json").write_text('{"started": 1')
    (broken / "y.json").write_text(json.dumps({"started": "yesterday", "seen": 2.0}))
    assert measure_goodput(str(tmp_path), "score-1") == Goodput()
    (tmp_path / "file").write_text("")
    with keep_journal(str(tmp_path / "file"), "score-1"):
        pass
