"""Metrics of a run for Prometheus: one table that defines them, and one function that records a value."""

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
"""Prefix of every metric name; it separates ours from Ray's own."""
INTERVAL = 5.0
"""Seconds between two reports of a heartbeat, and between two repetitions of a gauge."""
SHORT = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Histogram boundaries for batches, steps and checkpoints, in seconds."""
LONG = (10.0, 30.0, 100.0, 300.0, 1_000.0, 3_000.0, 10_000.0, 30_000.0, 100_000.0, 300_000.0)
"""Histogram boundaries for trials, in seconds."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """Definition of one metric."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    description: str
    tags: tuple[str, ...]
    """Keys of low cardinality: `stage`, `reason`, `state`, `split`, and `run` (an artifact's or a study's name)."""
    boundaries: tuple[float, ...] = ()
    """Bucket boundaries of a histogram. Ray estimates the sum from the midpoints of the buckets."""

    @property
    def series(self) -> tuple[str, ...]:
        """Names of its Prometheus series: Ray adds the prefix `ray_` and a suffix for the kind."""
        name = f"ray_{PREFIX}{self.name}"
        match self.kind:
            case "counter":
                return (f"{name}_total",)
            case "gauge":
                return (name,)
            case "histogram":
                return tuple(f"{name}_{suffix}" for suffix in ("bucket", "count", "sum"))


_TABLE = (
    Metric("stage_running", "gauge", "0 or 1", "1 while a driver is running this stage", ("stage",)),
    Metric("stage_seconds", "counter", "seconds", "driver time in this stage, including failed attempts", ("stage",)),
    Metric("stage_progress", "gauge", "0 to 1", "completed fraction of what the progress line counts", ("stage",)),
    Metric("rows_done", "counter", "rows", "rows counted by progress lines: records, pairs, steps", ("stage",)),
    Metric("rows_failed", "counter", "rows", "rows dropped or without a result", ("stage", "reason", "run")),
    Metric("bytes_written", "counter", "bytes", "bytes of the table parts written", ("stage", "run")),
    Metric("records_scored", "counter", "records", "records passed to the teacher", ("run",)),
    Metric("teacher_batch_seconds", "histogram", "seconds", "time the teacher takes per batch", ("run",), SHORT),
    Metric("pairs_written", "counter", "pairs", "preference pairs written", ("run",)),
    Metric("tokens_trained", "counter", "tokens", "tokens in training forward passes, without padding", ("run",)),
    Metric(
        "loss",
        "gauge",
        "nats",
        "training objective; for ORPO nll_loss plus beta times the odds-ratio loss",
        ("run", "split"),
    ),
    Metric("nonfinite_losses", "counter", "1", "logged losses that are NaN or infinite", ("run", "split")),
    Metric("nll_loss", "gauge", "nats", "negative log-likelihood per token of the chosen completion", ("run", "split")),
    Metric("log_odds_ratio", "gauge", "nats", "log-sigmoid of the log odds ratio, as logged by TRL", ("run", "split")),
    Metric(
        "rewards_accuracies", "gauge", "0 to 1", "share of pairs whose chosen completion is likelier", ("run", "split")
    ),
    Metric("grad_norm", "gauge", "1", "gradient norm before clipping", ("run",)),
    Metric("step_seconds", "histogram", "seconds", "time per optimizer step, including data loading", ("run",), SHORT),
    Metric("checkpoint_seconds", "histogram", "seconds", "time training is blocked by a checkpoint", ("run",), SHORT),
    Metric(
        "checkpoint_age_seconds", "gauge", "seconds", "time since the last checkpoint, or since the start", ("run",)
    ),
    Metric("sweep_trials", "gauge", "trials", "trials of a study in this state", ("run", "state")),
    Metric("trial_gpu_seconds", "histogram", "GPU-seconds", "cost of a trial, whatever its outcome", ("run",), LONG),
    Metric("productive_seconds", "gauge", "seconds", "allocated time whose work ended in an artifact", ("run",)),
    Metric("allocated_seconds", "gauge", "seconds", "time GPUs were allocated; CPUs if no GPU was", ("run",)),
)
METRICS = {metric.name: metric for metric in _TABLE}

_gauges: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
"""Last value of each gauge, by name and tags."""


def record_metric(name: str, value: float, **tags: str) -> None:
    """Record one value: add to a counter, set a gauge, or observe it in a histogram.

    Outside a Ray session there is no collector, and the value is dropped.

    Raises:
        KeyError: `name` is not in the table.
        ValueError: `tags` are not the tags of the metric.
    """
    metric = METRICS[name]
    if set(tags) != set(metric.tags):
        raise ValueError(f"{name}: got the tags {', '.join(tags)}; expected {', '.join(metric.tags)}")
    # Ray's counters reject zero
    if not _is_connected() or (metric.kind == "counter" and value <= 0):
        return
    instrument = _instrument(name)
    match metric.kind:
        case "counter":
            instrument.inc(value, tags)
        case "gauge":
            instrument.set(value, tags)
            _gauges[name, tuple(tags.items())] = value
            _start_repeating_gauges()
        case "histogram":
            instrument.observe(value, tags)


def record_failed_rows(stage: str, run: str, counts: Mapping[str, int]) -> None:
    """Record the number of failed rows per reason."""
    for reason, count in counts.items():
        record_metric("rows_failed", count, stage=stage, reason=reason, run=run)


@contextmanager
def heartbeat(stage: str) -> Iterator[None]:
    """Report every few seconds that this process is running a stage, until the block ends or the process dies."""
    ended = threading.Event()
    thread = threading.Thread(target=_beat, args=(stage, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _beat(stage: str, ended: threading.Event) -> None:
    last = time.monotonic()
    over = False
    while not over:
        over = ended.is_set()
        # a stage starts before it connects to Ray; that time is added to the first report after the connection
        if _is_connected():
            now = time.monotonic()
            record_metric("stage_seconds", now - last, stage=stage)
            record_metric("stage_running", 0 if over else 1, stage=stage)
            last = now
        ended.wait(INTERVAL)


@functools.cache
def _start_repeating_gauges() -> None:
    """Set gauges again for the lifetime of this process: Ray drops a gauge that misses two of its reports."""
    threading.Thread(target=_repeat_gauges, daemon=True).start()


def _repeat_gauges() -> None:
    while True:
        time.sleep(INTERVAL)
        for (name, tags), value in list(_gauges.items()):
            if _is_connected():
                _instrument(name).set(value, dict(tags))


def _is_connected() -> bool:
    # a process that has not imported Ray has no session; do not import it just to find out
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


@functools.cache
def _instrument(name: str) -> Any:
    from ray.util import metrics

    metric = METRICS[name]
    options = {"description": f"{metric.description} ({metric.unit})", "tag_keys": metric.tags}
    match metric.kind:
        case "counter":
            return metrics.Counter(PREFIX + name, **options)
        case "gauge":
            return metrics.Gauge(PREFIX + name, **options)
        case "histogram":
            return metrics.Histogram(PREFIX + name, boundaries=list(metric.boundaries), **options)
