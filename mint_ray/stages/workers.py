"""Run one function in Ray Train's workers, from its last checkpoint, and hear on the driver how far they are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mint_ray import storage
from mint_ray.artifacts import RUNS, Artifact
from mint_ray.loading import UserError
from mint_ray.stages.config import FitResources
from mint_ray.stages.session import connect
from mint_ray.trainers.config import TrainResources


def run_workers(
    work: Callable[[dict[str, Any]], None],
    job: dict[str, Any],
    artifact: Artifact,
    resources: FitResources | TrainResources,
    hear: Callable[..., None],
) -> Any:
    """Ray Train's result of `work({**job, "queue": queue})` in every worker; `hear(*message)` gets what they put there.

    A run of the artifact's name that was cut off goes on from its last checkpoint, below `RUNS` of the artifact's root.
    Raises the UserError that a worker raised, and what `hear` raised, after the work is done.
    """
    connect()
    filesystem, place = storage.resolve(storage.join(artifact.root, RUNS))
    with _listen(hear) as queue:
        trainer = TorchTrainer(
            work,
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
        return _fit(trainer)


def _fit(trainer: TorchTrainer) -> Any:
    try:
        return trainer.fit()
    except TrainingFailedError as failure:
        for error in getattr(failure, "worker_failures", {}).values():
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, UserError):
                    raise UserError(str(cause)) from failure
                cause = cause.__cause__
        raise


@contextmanager
def _listen(hear: Callable[..., None]) -> Iterator[Queue]:
    """A queue whose messages a thread of the driver passes to `hear`, up to the first that it raises on."""
    # beside the driver, so that no machine of the workers takes it along when it is lost
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue, done = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here}), threading.Event()
    raised: list[Exception] = []

    def listen() -> None:
        while not done.is_set():
            if queue.empty():
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
