"""The connection to Ray, made once by the first stage that has work for it, and how rows go through its actors."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import ray
import ray.data

from mint_ray.stages.config import EvaluateResources, ScoreResources
from mint_ray.telemetry import Progress

logger = logging.getLogger("mint_ray")


def connect() -> None:
    """Join the cluster of RAY_ADDRESS, or start one on this machine with nothing open to others."""
    if ray.is_initialized():
        return
    # progress is told by the stages in lines that a log file can hold; what workers say stays in Ray's own logs
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    ray.init(
        dashboard_host="127.0.0.1",
        log_to_driver=False,
        logging_level=logging.ERROR,
        configure_logging=True,
        runtime_env={"env_vars": {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}},
    )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    logger.info("ray: connected, %s", ", ".join(f"{k} {v:g}" for k, v in sorted(_resources().items())))


def map_rows(
    table: pa.Table,
    actor: type[Any],
    arguments: tuple[Any, ...],
    resources: ScoreResources | EvaluateResources,
    progress: Progress,
) -> Iterator[pa.Table]:
    """Each row of `table` through one of a pool of `actor(*arguments)`, batch by batch, in the order of the rows."""
    connect()
    # cut here and not by repartition: its tasks would wait for ever for the processors that the actors hold
    blocks = [table.slice(start, resources.batch_size) for start in range(0, len(table), resources.batch_size)]
    mapped = ray.data.from_arrow(blocks).map_batches(
        actor,
        fn_constructor_args=arguments,
        batch_size=resources.batch_size,
        batch_format="pyarrow",
        num_cpus=resources.cpus_per_actor,
        num_gpus=resources.gpus_per_actor,
        compute=ray.data.ActorPoolStrategy(size=resources.actors),
    )
    for batch in mapped.iter_batches(batch_size=None, batch_format="pyarrow"):
        progress.add(len(batch))
        yield batch


def _resources() -> dict[str, float]:
    return {key: value for key, value in ray.cluster_resources().items() if key in ("CPU", "GPU")}
