"""The account that the driver keeps of what training workers hold, by what they tell, against seconds counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError
from ray.train.v2.api.exceptions import ControllerError

from mint_ray.runtime import train_workers
from mint_ray.runtime.goodput import Amount, Attempt, Lease, Pool, weigh
from mint_ray.runtime.train_workers import BEGUN, _Account, _fit


class Told:
    """An account that hears at moments of our choosing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
        self.now = 0.0
        monkeypatch.setattr(train_workers.time, "time", lambda: self.now)
        self.pool = Pool(cpus=1, gpus=0, most=most, keeps=True, asked=0)
        self.passed_on: list[tuple[Any, ...]] = []
        self.account = _Account(self.pool, lambda *message: self.passed_on.append(message))

    def at(self, now: float, *message: Any) -> None:
        self.now = now
        self.account.hear(*message)


def test_steps_that_a_lost_group_had_taken_are_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch, most=2)
    # of a first group nothing is known but that it began
    told.at(6, BEGUN, 1, "z", 5.0)
    for rank, worker in ((1, "a"), (0, "b")):
        told.at(12, BEGUN, rank, worker, 10.0)
    told.at(20, 1, "loss")
    told.at(23, 2, "loss")
    told.at(26, 3, "loss")
    told.at(28, 3, "validated")
    # b's machine is lost; a new group of one goes on from the checkpoint of step 1
    told.at(42, BEGUN, 0, "c", 40.0)
    told.at(50, 1, "resumed")
    told.at(55, 2, "loss")
    told.at(60, 3, "loss")
    told.at(62, 3, "validated")
    told.at(66, 4, "loss")
    assert told.pool.reached == 4
    # a and b: ten seconds up to the first step, 8 of work; c: ten, then steps 2 and 3 again, then 6 of work
    assert {worker: (lease.startup, lease.work, lease.redone) for worker, lease in told.pool.leases.items()} == {
        "z": (0, 0, 0),
        "a": (10, 8, 0),
        "b": (10, 8, 0),
        "c": (10, 6, 10),
    }
    told.pool.until = 70
    found = weigh([Attempt(started=0, seen=71, ended=True, published=True, pools=[told.pool])])
    # z from 5 to 10, of which it told one; a and b from 10 to 40, the last 12 seconds of it lost; c from 40 to 70
    assert (found.rented, found.work) == (Amount(cpu_seconds=95), Amount(cpu_seconds=22))
    assert (found.startup, found.redone) == (Amount(cpu_seconds=30), Amount(cpu_seconds=4 + 34))
    assert (found.idle, found.waited_seconds) == (Amount(cpu_seconds=1 + 4), 5)
    assert [message[0] for message in told.passed_on] == [1, 2, 3, 3, 1, 2, 3, 3, 4]


def test_steps_that_an_earlier_run_had_taken_are_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_workers.goodput, "steps_reached", lambda: 5)
    told = Told(monkeypatch, most=1)
    told.at(1, BEGUN, 0, "a", 0.0)
    for now, step in ((10, 4), (13, 5), (17, 6)):
        told.at(now, step)
    assert told.pool.leases == {"a": Lease(since=0, seen=17, startup=10, work=4, redone=3)}


class Fails:
    """A trainer that fails with each of some errors, and then does not."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    def fit(self) -> str:
        if self.errors:
            raise ControllerError(self.errors.pop(0))
        return "trained"


def test_a_machine_that_is_lost_while_workers_start_is_one_failure_of_those_allowed() -> None:
    lost = ActorUnavailableError("the socket closed", b"0" * 16)
    trainer: Any = Fails(lost, lost)
    assert _fit(lambda: trainer, 2) == "trained"
    for errors in ([lost, lost], [ValueError("a bug")]):
        trainer = Fails(*errors)
        with pytest.raises(ControllerError):
            _fit(lambda: trainer, 1)  # noqa: B023
