"""Parallel runs: several pipelines at a time, each driven by a task that requests no CPU.

Each stage requests its resources when it starts and releases them when it ends. A pipeline therefore never holds what
another one waits for while it waits itself (ray#54305).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import ray
from ray.util.queue import Queue

from mint_ray.artifacts import Artifact
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.pipeline import run_pipeline
from mint_ray.plan import Done
from mint_ray.runtime.session import connect
from mint_ray.runtime.train_workers import listen

logger = logging.getLogger("mint_ray")

DRIVER_RESOURCES = {"memory": 2.0**20}
"""Resources of the driver of a pipeline: Ray requires some, and one megabyte takes nothing from the stages."""


def run_pipelines(
    configs: Mapping[str, PipelineConfig],
    last: str,
    max_concurrent: int,
    *,
    num_sequential: int = 0,
    max_attempts: int = 1,
    is_wanted: Callable[[str], bool] | None = None,
) -> Iterator[tuple[str, Done | Exception]]:
    """Run each pipeline up to its stage `last`; yield its name and its outputs, or its error, as they complete.

    Args:
        configs: The pipelines by name.
        last: Last stage to run.
        max_concurrent: Maximum number of pipelines at a time; 1 runs all of them in this process.
        num_sequential: The first pipelines to run one by one, in this process, before the others start: the others then
            find the outputs that all share.
        max_attempts: Maximum number of times that a failing pipeline is run.
        is_wanted: Function that is called with a name before that pipeline starts; False skips it.
    """
    waiting = [*configs]
    while waiting and (max_concurrent == 1 or len(configs) - len(waiting) < num_sequential):
        name = waiting.pop(0)
        if is_wanted is None or is_wanted(name):
            yield name, _outcome(partial(run_pipeline, configs[name], last), max_attempts)
    if not waiting:
        return
    connect()
    # a driver whose node fails is restarted in any case, and finds the outputs that are complete
    retries = {"max_retries": max(max_attempts - 1, 1), "retry_exceptions": max_attempts > 1}
    task = ray.remote(num_cpus=0, max_calls=1, memory=DRIVER_RESOURCES["memory"], **retries)(_run)
    running = dict[Any, str]()
    with listen(_log) as queue:
        while waiting or running:
            while waiting and len(running) < max_concurrent:
                name = waiting.pop(0)
                if is_wanted is None or is_wanted(name):
                    running[task.remote(name, configs[name], last, queue)] = name
            if running:
                [ended], _ = ray.wait(list(running), num_returns=1)
                yield running.pop(ended), _outcome(partial(ray.get, ended), 1)


def _outcome(run: Callable[[], Done], max_attempts: int) -> Done | Exception:
    try:
        return run()
    except Exception as error:
        return _outcome(run, max_attempts - 1) if max_attempts > 1 else error


def _run(name: str, config: PipelineConfig, last: str, queue: Queue) -> dict[str, Artifact]:
    logger.handlers, logger.propagate = [_QueueHandler(name, queue)], False
    logger.setLevel(logging.INFO)
    return run_pipeline(config, last)


class _QueueHandler(logging.Handler):
    """Handler that sends the log of a pipeline to the driver, which logs it."""

    def __init__(self, name: str, queue: Queue) -> None:
        super().__init__()
        self.pipeline, self.queue = name, queue

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        self.queue.put((record.levelno, self.pipeline, record.getMessage()))


def _log(level: int, name: str, message: str) -> None:
    logger.log(level, "%s: %s", name, message)
