"""The numbers of a run that Prometheus can collect: one table of them, and one way to tell one."""

from __future__ import annotations

import dataclasses
import functools
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

PREFIX = "mint_"
"""Of every name within Ray's own, which are told apart by it."""
TICK = 5.0
"""Seconds after which gauges, and a stage that is at work, are told again."""
SHORT = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
LONG = (10.0, 30.0, 100.0, 300.0, 1_000.0, 3_000.0, 10_000.0, 30_000.0, 100_000.0, 300_000.0)
"""Bounds of buckets, in seconds."""


@dataclasses.dataclass(frozen=True)
class Measure:
    """One number, as it is told and as the boards name it."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    description: str
    tags: tuple[str, ...]
    """Few values each: `stage`, `reason`, `state`, `split`, and `run`, the name of an artifact or a study."""
    bounds: tuple[float, ...] = ()
    """Of the buckets of a histogram. Ray keeps no sum beside them: it adds up the middles of the buckets."""

    @property
    def series(self) -> tuple[str, ...]:
        """Its names in Prometheus, where Ray puts itself in front and the kind behind."""
        name = f"ray_{PREFIX}{self.name}"
        match self.kind:
            case "counter":
                return (f"{name}_total",)
            case "gauge":
                return (name,)
            case "histogram":
                return tuple(f"{name}_{suffix}" for suffix in ("bucket", "count", "sum"))


_ROWS = (
    Measure("stage_running", "gauge", "0 or 1", "1 while a driver is at this stage", ("stage",)),
    Measure("stage_seconds", "counter", "seconds", "time drivers spent at this stage, finished or not", ("stage",)),
    Measure("stage_share", "gauge", "0 to 1", "how much of what a progress line counts is done", ("stage",)),
    Measure("rows_done", "counter", "rows", "what progress lines count: records, pairs, steps", ("stage",)),
    Measure("rows_failed", "counter", "rows", "rows left out or without a result", ("stage", "reason", "run")),
    Measure("bytes_written", "counter", "bytes", "bytes of the parts of tables", ("stage", "run")),
    Measure("records_scored", "counter", "records", "records the teacher was asked about", ("run",)),
    Measure("teacher_batch_seconds", "histogram", "seconds", "time of the teacher over one batch", ("run",), SHORT),
    Measure("pairs_written", "counter", "pairs", "preference pairs written", ("run",)),
    Measure("tokens_trained", "counter", "tokens", "tokens in forward passes of training, padding left out", ("run",)),
    Measure(
        "loss", "gauge", "nats", "what is minimised; of ORPO nll_loss and beta times the odds' loss", ("run", "split")
    ),
    Measure("losses_not_finite", "counter", "1", "logged losses that are no number, or infinite", ("run", "split")),
    Measure("nll_loss", "gauge", "nats", "negative log-likelihood of a token of the chosen answer", ("run", "split")),
    Measure("log_odds_ratio", "gauge", "nats", "log-sigmoid of the log odds, as in TRL's log", ("run", "split")),
    Measure(
        "rewards_accuracies", "gauge", "0 to 1", "share of pairs whose chosen answer is likelier", ("run", "split")
    ),
    Measure("grad_norm", "gauge", "1", "norm of the gradient before it is clipped", ("run",)),
    Measure("step_seconds", "histogram", "seconds", "time of one optimiser step, data included", ("run",), SHORT),
    Measure(
        "checkpoint_seconds", "histogram", "seconds", "time training stands still for a checkpoint", ("run",), SHORT
    ),
    Measure("checkpoint_age_seconds", "gauge", "seconds", "since the last checkpoint, or the start", ("run",)),
    Measure("sweep_trials", "gauge", "trials", "trials of a study in this state", ("run", "state")),
    Measure("trial_gpu_seconds", "histogram", "GPU-seconds", "what a trial cost, however it ended", ("run",), LONG),
    Measure("useful_seconds", "gauge", "seconds", "of the rented ones, those whose work became an artifact", ("run",)),
    Measure("rented_seconds", "gauge", "seconds", "time GPUs were held, or processors where none was", ("run",)),
)
MEASURES = {row.name: row for row in _ROWS}

_gauges: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
"""What was last told of each, with its tags."""


def measure(name: str, value: float, **tags: str) -> None:
    """Tell one number of the table: add to a counter, set a gauge, put a value into a histogram.

    Outside a Ray session nobody would collect it, and it is dropped. Raises KeyError for a name that is not in the
    table, and ValueError for other tags than it has.
    """
    row = MEASURES[name]
    if set(tags) != set(row.tags):
        raise ValueError(f"{name}: got the tags {', '.join(tags)}; it has {', '.join(row.tags)}")
    # a counter takes no zero
    if not _is_connected() or (row.kind == "counter" and value <= 0):
        return
    instrument = _instrument(name)
    match row.kind:
        case "counter":
            instrument.inc(value, tags)
        case "gauge":
            instrument.set(value, tags)
            _gauges[name, tuple(tags.items())] = value
            _keep_gauges()
        case "histogram":
            instrument.observe(value, tags)


def measure_failed(stage: str, run: str, counts: Mapping[str, int]) -> None:
    """Tell how many rows failed, by reason."""
    for reason, count in counts.items():
        measure("rows_failed", count, stage=stage, reason=reason, run=run)


@contextmanager
def running(stage: str) -> Iterator[None]:
    """Tell that this process is at a stage, every few seconds until the block ends: of one that dies, no longer."""
    ended = threading.Event()
    thread = threading.Thread(target=_tick, args=(stage, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _tick(stage: str, ended: threading.Event) -> None:
    last = time.monotonic()
    over = False
    while not over:
        over = ended.is_set()
        # a stage begins before it connects to Ray: that time is told with the first tick behind it
        if _is_connected():
            now = time.monotonic()
            measure("stage_seconds", now - last, stage=stage)
            measure("stage_running", 0 if over else 1, stage=stage)
            last = now
        ended.wait(TICK)


@functools.cache
def _keep_gauges() -> None:
    """Tell gauges again as long as this process lives: Ray forgets one after two of its reports."""
    threading.Thread(target=_tell_gauges, daemon=True).start()


def _tell_gauges() -> None:
    while True:
        time.sleep(TICK)
        for (name, tags), value in list(_gauges.items()):
            if _is_connected():
                _instrument(name).set(value, dict(tags))


def _is_connected() -> bool:
    # whoever has not loaded Ray is in no session, and need not load it for that
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


@functools.cache
def _instrument(name: str) -> Any:
    from ray.util import metrics

    row = MEASURES[name]
    told = {"description": f"{row.description} ({row.unit})", "tag_keys": row.tags}
    match row.kind:
        case "counter":
            return metrics.Counter(PREFIX + name, **told)
        case "gauge":
            return metrics.Gauge(PREFIX + name, **told)
        case "histogram":
            return metrics.Histogram(PREFIX + name, boundaries=list(row.bounds), **told)
