"""Run one function in Ray Train's workers, from its last checkpoint, and receive their messages on the driver."""

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
from mint_ray.runtime.session import connect
from mint_ray.trainers.config import TrainResources

logger = logging.getLogger("mint_ray")

STARTED = "started"
"""First item of a worker's first message; then its rank, its name, and the time since which it has its resources."""


def run_workers(
    work: Callable[[dict[str, Any]], None],
    job: dict[str, Any],
    artifact: Artifact,
    resources: FitResources | TrainResources,
    on_message: Callable[..., None],
) -> Any:
    """Run `work({**job, "queue": queue})` in every Ray Train worker and return Ray Train's result.

    The driver calls `on_message(*message)` for each message that workers put into the queue. A message starts with a
    step number that grows, also over attempts: a step that was reached before is repeated work. An interrupted run for
    the same artifact is resumed from its last checkpoint, below `RUNS` of the artifact's root.

    Raises:
        UserError: A worker raised it.
        Exception: `on_message` raised it; raised after the work is done.
    """
    connect()
    # Ray Train collects one report per health check, by default every two seconds: a short run would wait for its
    # reports long after its last step
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    filesystem, path = storage.resolve(storage.join(artifact.root, RUNS))
    num_workers = resources.num_workers
    max_workers = num_workers[-1] if isinstance(num_workers, tuple) else num_workers
    gpus = resources.gpus_per_worker
    with (
        goodput.record_pool(resources.cpus_per_worker, gpus, max_workers=max_workers, is_durable=True) as pool,
        listen(_TrainAccount(pool, on_message).receive) as queue,
    ):
        trainer = functools.partial(
            TorchTrainer,
            _announce(work, pool.requested_at),
            train_loop_config={**job, "queue": queue},
            scaling_config=ScalingConfig(
                num_workers=num_workers,
                use_gpu=gpus > 0,
                resources_per_worker={"CPU": resources.cpus_per_worker} | ({"GPU": gpus} if gpus else {}),
            ),
            run_config=RunConfig(
                name=artifact.name,
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=resources.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=1),
            ),
        )
        return _fit(trainer, resources.max_failures)


class _TrainAccount:
    """Resource accounting of training workers, from their messages.

    Up to the first step's message a worker starts up; after that it is productive up to its group's last message. Steps
    that an earlier group or attempt has reached are lost work.
    """

    def __init__(self, pool: goodput.WorkerPool, on_message: Callable[..., None]) -> None:
        self.pool, self.on_message = pool, on_message
        pool.max_step = goodput.last_step_of_earlier_attempts()
        self.group: dict[int, tuple[str, float]] = {}
        """Name and start time of each worker of the current group, by rank."""
        self.last: tuple[int, float] | None = None
        """The group's last step and the time of its message."""

    def receive(self, *message: Any) -> None:
        """Account for a message and pass it on, unless it is the first one of a worker."""
        now = time.time()
        if message[0] == STARTED:
            _, rank, worker, started_at = message
            if self.last is not None or rank in self.group:
                # a new group replaces the one before
                for lost, _ in self.group.values():
                    self.pool.mark_lost(lost, started_at)
                self.group, self.last = {}, None
            self.group[rank] = worker, started_at
            self.pool.report(worker, started_at=started_at, at=now)
            return
        step = int(message[0])
        for worker, started_at in self.group.values():
            if self.last is None:
                self.pool.report(worker, started_at=started_at, at=now, startup=now - started_at)
            elif step > self.pool.max_step or self.last[0] == self.pool.max_step:
                self.pool.report(worker, started_at=started_at, at=now, productive=now - self.last[1])
            else:
                self.pool.report(worker, started_at=started_at, at=now, lost=now - self.last[1])
        self.last = step, now
        self.pool.max_step = max(self.pool.max_step, step)
        self.on_message(*message)


def _announce(work: Callable[[dict[str, Any]], None], requested_at: float) -> Callable[[dict[str, Any]], None]:
    """Return `work` preceded by the message that the worker has started."""

    def announce_and_work(job: dict[str, Any]) -> None:
        rank = ray.train.get_context().get_world_rank()
        # each worker is an actor with a process of its own; Ray may have started that before the request
        process_started_at = goodput.process_started_at()
        started_at = process_started_at if process_started_at > requested_at else time.time()
        job["queue"].put((STARTED, rank, uuid.uuid4().hex, started_at))
        work(job)

    return announce_and_work


def _fit(trainer: Callable[[], TorchTrainer], max_failures: int) -> Any:
    try:
        return trainer().fit()
    except ControllerError as failure:
        # Ray Train gives up if a node fails while workers start on it, although a restart would succeed a moment later;
        # a trainer of the same name resumes from the last checkpoint
        if not max_failures or not isinstance(failure.controller_failure, RayActorError):
            raise
        logger.warning("a node failed while workers were starting; restarting from the last checkpoint")
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
def listen(on_message: Callable[..., None]) -> Iterator[Queue]:
    """Yield a queue; a thread of the driver calls `on_message(*message)` for each message, until the first error.

    The block's end waits for all messages, then raises the error that `on_message` raised, if any.
    """
    # on the driver's node, so that the failure of a worker's node does not end it
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue, done = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here}), threading.Event()
    raised: list[Exception] = []

    def receive() -> None:
        while True:
            # read before the queue: what was put before the end is still delivered
            is_done = done.is_set()
            if queue.empty():
                if is_done:
                    return
                # a get with a timeout would leave a failed task in Ray each time
                done.wait(0.5)
                continue
            message = queue.get()
            if not raised:
                try:
                    on_message(*message)
                except Exception as error:
                    raised.append(error)

    thread = threading.Thread(target=receive, daemon=True)
    thread.start()
    try:
        yield queue
    finally:
        done.set()
        thread.join()
        queue.shutdown()
    if raised:
        raise raised[0]
