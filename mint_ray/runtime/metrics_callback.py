"""Record the metrics of a training for Prometheus, from the callbacks of its trainer."""

from __future__ import annotations

import math
import time
from typing import Any

from transformers import TrainerCallback

from mint_ray.telemetry import record_metric

LOGGED_METRICS = {
    "loss": "loss",
    "nll_loss": "nll_loss",
    "log_odds_ratio": "log_odds_ratio",
    "rewards/accuracies": "rewards_accuracies",
}
"""Name of each metric, by its key in the trainer's log without the prefix `eval_` of the validation split."""


class MetricsCallback(TrainerCallback):
    """Callback of one training worker. It comes after the callbacks that save, whose time it measures."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.num_tokens = 0
        self.saved_at = self.last_event = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        # a resumed run has seen tokens in an earlier attempt, which recorded them
        self.num_tokens = int(state.num_input_tokens_seen)
        self.saved_at = self.last_event = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Record the time and the tokens of a step, and the age of the last checkpoint."""
        record_metric("step_seconds", self._seconds_since_last_event(), run=self.run)
        record_metric("tokens_trained", int(state.num_input_tokens_seen) - self.num_tokens, run=self.run)
        record_metric("checkpoint_age_seconds", self.last_event - self.saved_at, run=self.run)
        self.num_tokens = int(state.num_input_tokens_seen)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Record the metrics that the trainer logs."""
        for key, value in logs.items():
            name = LOGGED_METRICS.get(key.removeprefix("eval_"))
            split = "validation" if key.startswith("eval_") else "train"
            if name == "loss" and not math.isfinite(value):
                # Ray drops such a value of a gauge
                record_metric("nonfinite_losses", 1, run=self.run, split=split)
            elif name is not None:
                record_metric(name, float(value), run=self.run, split=split)
        if "grad_norm" in logs:
            record_metric("grad_norm", float(logs["grad_norm"]), run=self.run)
        self._seconds_since_last_event()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the time of the validation out of that of the next step."""
        self._seconds_since_last_event()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Record the time of a checkpoint."""
        # the trainer saves immediately after a step, its log or its validation
        record_metric("checkpoint_seconds", self._seconds_since_last_event(), run=self.run)
        self.saved_at = self.last_event

    def _seconds_since_last_event(self) -> float:
        before, self.last_event = self.last_event, time.monotonic()
        return self.last_event - before
