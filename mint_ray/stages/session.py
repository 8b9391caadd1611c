"""The connection to Ray: made once, by the first stage that has work for it."""

from __future__ import annotations

import logging
import os

import ray
from ray.data import DataContext

logger = logging.getLogger("mint_ray")


def connect() -> None:
    """Join the cluster of RAY_ADDRESS, or start one on this machine with nothing open to others."""
    if ray.is_initialized():
        return
    # progress is told by the stages in lines that a log file can hold
    os.environ.setdefault("RAY_TRAIN_ENABLE_PROGRESS_LOGGING", "0")
    ray.init(
        dashboard_host="127.0.0.1",
        log_to_driver=False,
        logging_level=logging.ERROR,
        configure_logging=True,
        runtime_env={"env_vars": {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}},
    )
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    logger.info("ray: connected, %s", ", ".join(f"{k} {v:g}" for k, v in sorted(_resources().items())))


def _resources() -> dict[str, float]:
    return {key: value for key, value in ray.cluster_resources().items() if key in ("CPU", "GPU")}
