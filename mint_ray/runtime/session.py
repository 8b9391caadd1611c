"""The connection to Ray, made once by the first stage that has work for it."""

from __future__ import annotations

import logging
import os

import ray
import ray.data

logger = logging.getLogger("mint_ray")

PATIENCE = 30.0
"""Seconds without any result after which it is looked up whether the cluster has what was asked for."""


def connect() -> None:
    """Join the cluster of RAY_ADDRESS, or start one on this machine with nothing open to others."""
    if not ray.is_initialized():
        _start()
    # a spec's relative paths mean for trials and training workers what they mean here; Ray would give them folders of
    # their own to stand in
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # one part may well take hours, and a cluster may have to grow first: Ray Data would give up after half an hour
    context.execution_no_progress_timeout_s = -1
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def tell_what_lacks(asked: dict[str, float]) -> None:
    """Warn of processors and GPUs that were asked for and are not there, so that nobody waits for them unawares.

    Nothing is done about it: a cluster that grows is given them by and by.
    """
    there = _resources()
    lacks = [f"{key} {there.get(key, 0):g} of {asked[key]:g}" for key in asked if asked[key] > there.get(key, 0)]
    if lacks:
        logger.warning("ray: nothing is done yet and the cluster has %s; waiting for more", ", ".join(lacks))


def _start() -> None:
    # progress is told by the stages in lines that a log file can hold; what workers say stays in Ray's own logs
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    ray.init(
        # left to itself Ray would look for the last one started here, and wait for it if it is dead
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
