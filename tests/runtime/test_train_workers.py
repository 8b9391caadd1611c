"""Resource accounting of training workers, against seconds worked out by hand; restarts; messages to the driver."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError
from ray.train.v2.api.exceptions import ControllerError

from mint_ray.runtime import train_workers
from mint_ray.runtime.goodput import Attempt, ResourceSeconds, WorkerPool, WorkerUsage, sum_attempts
from mint_ray.runtime.train_workers import STARTED, _fit, _TrainAccount, listen


class AccountAt:
    """An account that receives messages at chosen times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, max_workers: int) -> None:
        self.now = 0.0
        monkeypatch.setattr(train_workers.time, "time", lambda: self.now)
        self.pool = WorkerPool(cpus=1, gpus=0, max_workers=max_workers, is_durable=True, requested_at=0)
        self.messages: list[tuple[Any, ...]] = []
        self.account = _TrainAccount(self.pool, lambda *message: self.messages.append(message))

    def receive(self, now: float, *message: Any) -> None:
        self.now = now
        self.account.receive(*message)


def test_steps_that_a_failed_group_had_reached_are_lost_work(monkeypatch: pytest.MonkeyPatch) -> None:
    account = AccountAt(monkeypatch, max_workers=2)
    # the first group reports its start only
    account.receive(6, STARTED, 1, "z", 5.0)
    for rank, worker in ((1, "a"), (0, "b")):
        account.receive(12, STARTED, rank, worker, 10.0)
    account.receive(20, 1, "loss")
    account.receive(23, 2, "loss")
    account.receive(26, 3, "loss")
    account.receive(28, 3, "validated")
    # the node of b fails; a new group of one resumes from the checkpoint of step 1
    account.receive(42, STARTED, 0, "c", 40.0)
    account.receive(50, 1, "resumed")
    account.receive(55, 2, "loss")
    account.receive(60, 3, "loss")
    account.receive(62, 3, "validated")
    account.receive(66, 4, "loss")
    assert account.pool.max_step == 4
    # a and b: ten seconds up to the first step, 8 productive; c: ten, then steps 2 and 3 again, then 6 productive
    usages = account.pool.workers.items()
    assert {worker: (usage.startup, usage.productive, usage.lost) for worker, usage in usages} == {
        "z": (0, 0, 0),
        "a": (10, 8, 0),
        "b": (10, 8, 0),
        "c": (10, 6, 10),
    }
    account.pool.released_at = 70
    attempt = Attempt(started_at=0, updated_at=71, is_finished=True, has_published=True, pools=[account.pool])
    found = sum_attempts([attempt])
    # z from 5 to 10, and it reported one second; a and b from 10 to 40, the last 12 seconds lost; c from 40 to 70
    assert (found.allocated, found.productive) == (ResourceSeconds(cpu_seconds=95), ResourceSeconds(cpu_seconds=22))
    assert (found.startup, found.lost) == (ResourceSeconds(cpu_seconds=30), ResourceSeconds(cpu_seconds=4 + 34))
    assert (found.idle, found.waiting_seconds) == (ResourceSeconds(cpu_seconds=1 + 4), 5)
    assert [message[0] for message in account.messages] == [1, 2, 3, 3, 1, 2, 3, 3, 4]


def test_steps_that_an_earlier_attempt_had_reached_are_lost_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_workers.goodput, "last_step_of_earlier_attempts", lambda: 5)
    account = AccountAt(monkeypatch, max_workers=1)
    account.receive(1, STARTED, 0, "a", 0.0)
    for now, step in ((10, 4), (13, 5), (17, 6)):
        account.receive(now, step)
    assert account.pool.workers == {"a": WorkerUsage(started_at=0, reported_at=17, startup=10, productive=4, lost=3)}


class FailingTrainer:
    """A trainer that fails once with each error, and then succeeds."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    def fit(self) -> str:
        if self.errors:
            raise ControllerError(self.errors.pop(0))
        return "trained"


def test_a_node_failure_while_workers_start_counts_as_one_of_the_allowed_failures() -> None:
    node_failure = ActorUnavailableError("the socket closed", b"0" * 16)
    trainer: Any = FailingTrainer(node_failure, node_failure)
    assert _fit(lambda: trainer, 2) == "trained"
    for errors in ([node_failure, node_failure], [ValueError("a bug")]):
        trainer = FailingTrainer(*errors)
        with pytest.raises(ControllerError):
            _fit(lambda: trainer, 1)  # noqa: B023


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_messages_arrive_in_order_until_the_first_error_which_is_raised_at_the_end() -> None:
    received: list[int] = []

    def on_message(number: int) -> None:
        received.append(number)
        if number == 2:
            raise ValueError("stop")

    with listen(received.append) as queue:
        for number in range(5):
            queue.put((number,))
    assert received == [0, 1, 2, 3, 4]
    received.clear()
    is_complete = False
    with pytest.raises(ValueError, match="stop"), listen(on_message) as queue:
        for number in range(5):
            queue.put((number,))
        is_complete = True
    assert is_complete
    assert received == [0, 1, 2]
