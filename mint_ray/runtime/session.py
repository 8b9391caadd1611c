"""The connection to Ray, made by the first stage that needs it."""

from __future__ import annotations

import logging
import os

import ray
import ray.data

logger = logging.getLogger("mint_ray")

WARN_AFTER_SECONDS = 30.0
"""Seconds without any result after which the cluster's resources are compared with the requested ones."""


def connect() -> None:
    """Connect to the cluster of RAY_ADDRESS, or start Ray on this machine, reachable from this machine only."""
    if not ray.is_initialized():
        _start()
    # relative paths of a spec mean the same for trials and training workers as here; Ray would give each a working
    # directory of its own
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # one part can take hours, and a cluster may have to grow first: Ray Data would give up after half an hour
    context.execution_no_progress_timeout_s = -1
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def warn_about_missing_resources(requested: dict[str, float]) -> None:
    """Log a warning if the cluster has fewer CPUs or GPUs than requested; an autoscaling cluster may still add them."""
    available = _resources()
    missing = [
        f"{available.get(key, 0):g} of {number:g} {key}s"
        for key, number in requested.items()
        if number > available.get(key, 0)
    ]
    if missing:
        logger.warning("ray: no work has started; the cluster has %s; waiting for more", ", ".join(missing))


def _start() -> None:
    # the stages log progress in lines that suit a file; what workers print stays in Ray's own logs
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    ray.init(
        # without an address, Ray would look for the cluster that was last started here, and wait for it if it is dead
        address=os.environ.get("RAY_ADDRESS") or "local",
        dashboard_host="127.0.0.1",
        log_to_driver=False,
        logging_level=logging.ERROR,
        configure_logging=True,
        runtime_env={"env_vars": {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}},
    )
    logger.info("ray: connected, %s", ", ".join(f"{k} {v:g}" for k, v in sorted(_resources().items())))


def _resources() -> dict[str, float]:
    return {key: value for key, value in ray.cluster_resources().items() if key in ("CPU", "GPU")}
