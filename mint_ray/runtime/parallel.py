"""Run several pipelines, so many at a time, each in a task of its own that asks for no processor.

Each stage asks for what it needs, all at once, and gives it back before the next one asks, so no pipeline ever holds
what another waits for while it waits itself (ray#54305).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import ray
from ray.util.queue import Queue

from mint_ray.artifacts import Artifact
from mint_ray.config.loader import UserError, dump, from_data
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.pipeline import Done, run_pipeline
from mint_ray.runtime.session import connect
from mint_ray.runtime.train_workers import listen

logger = logging.getLogger("mint_ray")

DRIVER = {"memory": 2.0**20}
"""What the driver of a pipeline asks for: something, for Ray wants a number, and nothing that a stage could miss."""


def run_several(
    configs: Mapping[str, PipelineConfig],
    last: str,
    concurrent: int,
    *,
    ahead: int = 0,
    attempts: int = 1,
    is_wanted: Callable[[str], bool] = lambda name: True,
) -> Iterator[tuple[str, Done | Exception]]:
    """Name and outcome of each pipeline up to its stage `last`, as they end: its artifacts, or what it raised.

    The first `ahead` run before the others, one by one, in this process, as all do where `concurrent` is 1: what the
    others share with them they find. `is_wanted` is asked before each begins; one that is not is left out.
    """
    waiting = list(configs)
    while waiting and (concurrent == 1 or len(configs) - len(waiting) < ahead):
        if is_wanted(name := waiting.pop(0)):
            yield name, _outcome(partial(run_pipeline, configs[name], last), attempts)
    if not waiting:
        return
    connect()
    # one whose machine is lost begins again in any case, and finds what is there
    retries = {"max_retries": max(attempts - 1, 1), "retry_exceptions": attempts > 1}
    task = ray.remote(num_cpus=0, max_calls=1, memory=DRIVER["memory"], **retries)(_run)
    running = dict[Any, str]()
    with listen(_pass_on) as queue:
        while waiting or running:
            while waiting and len(running) < concurrent:
                if is_wanted(name := waiting.pop(0)):
                    running[task.remote(name, dump(configs[name]), last, queue)] = name
            if running:
                [ended], _ = ray.wait(list(running), num_returns=1)
                yield running.pop(ended), _outcome(partial(ray.get, ended), 1)


def one_line(error: BaseException) -> str:
    """What went wrong, as it stands in a table."""
    # what Ray carries over it wraps, and ends with advice of its own
    inner = getattr(error, "cause", None) or (None if isinstance(error, UserError) else error.__cause__)
    if isinstance(inner, BaseException):
        return one_line(inner)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return lines[-1] if isinstance(error, UserError) else f"{type(error).__name__}: {lines[-1]}"


def _outcome(run: Callable[[], Done], attempts: int) -> Done | Exception:
    try:
        return run()
    except Exception as error:
        return _outcome(run, attempts - 1) if attempts > 1 else error


def _run(name: str, config: dict[str, Any], last: str, queue: Queue) -> dict[str, Artifact]:
    logger.handlers, logger.propagate = [_Teller(name, queue)], False
    logger.setLevel(logging.INFO)
    return run_pipeline(from_data(PipelineConfig, config), last)


class _Teller(logging.Handler):
    """Sends what a pipeline logs to the driver, which shows it."""

    def __init__(self, name: str, queue: Queue) -> None:
        super().__init__()
        self.pipeline, self.queue = name, queue

    def emit(self, record: logging.LogRecord) -> None:
        self.queue.put((record.levelno, self.pipeline, record.getMessage()))


def _pass_on(level: int, name: str, message: str) -> None:
    logger.log(level, "%s: %s", name, message)
