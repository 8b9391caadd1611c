"""Run one function in Ray Train's workers, from its last checkpoint, and hear on the driver how far they are."""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mint_ray import storage
from mint_ray.artifacts import RUNS, Artifact
from mint_ray.config.loader import UserError
from mint_ray.config.stages import FitResources
from mint_ray.runtime import goodput
from mint_ray.runtime.map_parts import held_since
from mint_ray.runtime.session import connect
from mint_ray.trainers.config import TrainResources

logger = logging.getLogger("mint_ray")

BEGUN = "begun"
"""First word of a worker's first message; behind it rank, a name of its own, and since when it holds its share."""


def run_workers(
    work: Callable[[dict[str, Any]], None],
    job: dict[str, Any],
    artifact: Artifact,
    resources: FitResources | TrainResources,
    hear: Callable[..., None],
) -> Any:
    """Ray Train's result of `work({**job, "queue": queue})` in every worker; `hear(*message)` gets what they put there.

    A message begins with a step that grows, also over attempts: one that was reached before is work done again.

    A run of the artifact's name that was cut off goes on from its last checkpoint, below `RUNS` of the artifact's root.
    Raises the UserError that a worker raised, and what `hear` raised, after the work is done.
    """
    connect()
    # Ray Train takes in one report whenever it looks after its workers, by itself every two seconds: reports of a short
    # run would be waited for long after its last step
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    filesystem, place = storage.resolve(storage.join(artifact.root, RUNS))
    least_and_most = resources.num_workers if isinstance(resources.num_workers, tuple) else (resources.num_workers,)
    held = goodput.ask(resources.cpus_per_worker, resources.gpus_per_worker, most=least_and_most[-1], keeps=True)
    with held as pool, listen(_Account(pool, hear).hear) as queue:
        trainer = functools.partial(
            TorchTrainer,
            _begin(work, pool.asked),
            train_loop_config={**job, "queue": queue},
            scaling_config=ScalingConfig(
                num_workers=resources.num_workers,
                use_gpu=resources.gpus_per_worker > 0,
                resources_per_worker={"CPU": resources.cpus_per_worker}
                | ({"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {}),
            ),
            run_config=RunConfig(
                name=artifact.name,
                storage_path=place,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=resources.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=1),
            ),
        )
        return _fit(trainer, resources.max_failures)


class _Account:
    """Hears the workers, and keeps the account of what they hold: up to a worker's first word it starts, then it works
    until its group's last; steps that an earlier group or run has taken are done again."""

    def __init__(self, pool: goodput.Pool, hear: Callable[..., None]) -> None:
        self.pool, self.pass_on = pool, hear
        pool.reached = goodput.steps_reached()
        self.group: dict[int, tuple[str, float]] = {}
        """By rank: workers of the group that is at work, and since when."""
        self.last: tuple[int, float] | None = None
        """The group's last step, and when it was told of."""

    def hear(self, *message: Any) -> None:
        now = time.time()
        if message[0] == BEGUN:
            _, rank, worker, since = message
            if self.last is not None or rank in self.group:
                for lost, _ in self.group.values():
                    self.pool.lose(lost, since)
                self.group, self.last = {}, None
            self.group[rank] = worker, since
            self.pool.tell(worker, since=since, at=now)
            return
        step = int(message[0])
        for worker, since in self.group.values():
            if self.last is None:
                self.pool.tell(worker, since=since, at=now, startup=now - since)
            elif step > self.pool.reached or self.last[0] == self.pool.reached:
                self.pool.tell(worker, since=since, at=now, work=now - self.last[1])
            else:
                self.pool.tell(worker, since=since, at=now, redone=now - self.last[1])
        self.last = step, now
        self.pool.reached = max(self.pool.reached, step)
        self.pass_on(*message)


def _begin(work: Callable[[dict[str, Any]], None], asked: float) -> Callable[[dict[str, Any]], None]:
    def begin(job: dict[str, Any]) -> None:
        rank = ray.train.get_context().get_world_rank()
        job["queue"].put((BEGUN, rank, uuid.uuid4().hex, held_since(asked)))
        work(job)

    return begin


def _fit(trainer: Callable[[], TorchTrainer], max_failures: int) -> Any:
    try:
        return trainer().fit()
    except ControllerError as failure:
        # a machine that is lost while workers start on it: Ray Train gives up, although it would begin again a moment
        # later; a trainer of the same name goes on from the last checkpoint
        if not max_failures or not isinstance(failure.controller_failure, RayActorError):
            raise
        logger.warning("a machine was lost while workers started; beginning again from the last checkpoint")
        return _fit(trainer, max_failures - 1)
    except TrainingFailedError as failure:
        for error in getattr(failure, "worker_failures", {}).values():
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, UserError):
                    raise UserError(str(cause)) from failure
                cause = cause.__cause__
        raise


@contextmanager
def listen(hear: Callable[..., None]) -> Iterator[Queue]:
    """A queue whose messages a thread of the driver passes to `hear`, up to the first that it raises on."""
    # beside the driver, so that no machine of the workers takes it along when it is lost
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue, done = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here}), threading.Event()
    raised: list[Exception] = []

    def listen() -> None:
        while True:
            # looked at first: what was put before the end is still passed on
            is_done = done.is_set()
            if queue.empty():
                if is_done:
                    return
                # not a get that times out: each would stand among Ray's failed tasks
                done.wait(0.5)
                continue
            message = queue.get()
            if not raised:
                try:
                    hear(*message)
                except Exception as error:
                    raised.append(error)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield queue
    finally:
        done.set()
        thread.join()
        queue.shutdown()
    if raised:
        raise raised[0]
