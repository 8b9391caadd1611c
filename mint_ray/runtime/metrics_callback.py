"""Tell Prometheus how a training goes, from what its trainer tells of itself."""

from __future__ import annotations

import math
import time
from typing import Any

from transformers import TrainerCallback

from mint_ray.telemetry import record_metric

LOGGED = {
    "loss": "loss",
    "nll_loss": "nll_loss",
    "log_odds_ratio": "log_odds_ratio",
    "rewards/accuracies": "rewards_accuracies",
}
"""Key of the trainer's log, after `eval_` on the validation split, to the name of the measure."""


class Meter(TrainerCallback):
    """For one worker of a training; behind the callbacks that save, whose time it measures."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.tokens = 0
        self.saved = self.last = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # a run that goes on from a checkpoint has seen some in an earlier attempt, which told of them
        self.tokens = int(state.num_input_tokens_seen)
        self.saved = self.last = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        record_metric("step_seconds", self._lap(), run=self.run)
        record_metric("tokens_trained", int(state.num_input_tokens_seen) - self.tokens, run=self.run)
        record_metric("checkpoint_age_seconds", self.last - self.saved, run=self.run)
        self.tokens = int(state.num_input_tokens_seen)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        for key, value in logs.items():
            name = LOGGED.get(key.removeprefix("eval_"))
            split = "validation" if key.startswith("eval_") else "train"
            if name == "loss" and not math.isfinite(value):
                # as a gauge Ray drops it
                record_metric("nonfinite_losses", 1, run=self.run, split=split)
            elif name is not None:
                record_metric(name, float(value), run=self.run, split=split)
        if "grad_norm" in logs:
            record_metric("grad_norm", float(logs["grad_norm"]), run=self.run)
        self._lap()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._lap()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # the trainer saves right after a step, its log or its validation
        record_metric("checkpoint_seconds", self._lap(), run=self.run)
        self.saved = self.last

    def _lap(self) -> float:
        """Seconds since something of the trainer last ended."""
        before, self.last = self.last, time.monotonic()
        return self.last - before
