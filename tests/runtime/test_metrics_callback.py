"""Metrics recorded by the callback of a training; Prometheus itself is in tests/dashboards."""

from __future__ import annotations

import math
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from mint_ray.runtime.metrics_callback import MetricsCallback
from mint_ray.telemetry import METRICS

Recorded = list[tuple[str, float, dict[str, str]]]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """The metrics that the callback records, in order."""
    found: Recorded = []

    def record(name: str, value: float, **tags: str) -> None:
        assert set(tags) == set(METRICS[name].tags)
        found.append((name, value, tags))

    monkeypatch.setattr("mint_ray.runtime.metrics_callback.record_metric", record)
    return found


def log(callback: MetricsCallback, **logs: float) -> None:
    state, control = TrainerState(), TrainerControl()
    callback.on_log(None, state, control, logs=logs)


def test_a_nonfinite_loss_is_counted_and_not_recorded(recorded: Recorded) -> None:
    log(MetricsCallback("train-1"), **{"loss": math.nan, "eval_loss": math.inf, "nll_loss": 2.0})
    assert recorded == [
        ("nonfinite_losses", 1, {"run": "train-1", "split": "train"}),
        ("nonfinite_losses", 1, {"run": "train-1", "split": "validation"}),
        ("nll_loss", 2.0, {"run": "train-1", "split": "train"}),
    ]


def test_known_metrics_of_a_log_are_recorded_by_split(recorded: Recorded) -> None:
    logs: dict[str, Any] = {"loss": 1.0, "rewards/accuracies": 0.5, "learning_rate": 1e-4, "grad_norm": 3.0}
    log(MetricsCallback("train-1"), **logs, **{"eval_log_odds_ratio": -0.5, "eval_runtime": 9.0})
    train, validation = {"run": "train-1", "split": "train"}, {"run": "train-1", "split": "validation"}
    assert recorded == [
        ("loss", 1.0, train),
        ("rewards_accuracies", 0.5, train),
        ("log_odds_ratio", -0.5, validation),
        ("grad_norm", 3.0, {"run": "train-1"}),
    ]


def test_a_resumed_run_records_its_own_tokens_only(recorded: Recorded) -> None:
    callback, state, control = MetricsCallback("train-1"), TrainerState(num_input_tokens_seen=700), TrainerControl()
    callback.on_train_begin(None, state, control)
    for num_tokens in (800, 950):
        state.num_input_tokens_seen = num_tokens
        callback.on_step_end(None, state, control)
    assert [value for name, value, _ in recorded if name == "tokens_trained"] == [100, 150]


def test_seconds_are_recorded_for_the_step_or_for_the_checkpoint(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    # created, started; end of a step, its log, its validation; saved; end of the next step
    now = iter([0.0, 10.0, 13.0, 13.5, 20.0, 22.0, 26.0])
    monkeypatch.setattr("mint_ray.runtime.metrics_callback.time.monotonic", lambda: next(now))
    callback, state, control = MetricsCallback("train-1"), TrainerState(), TrainerControl()
    callback.on_train_begin(None, state, control)
    callback.on_step_end(None, state, control)
    log(callback)
    callback.on_evaluate(None, state, control)
    callback.on_save(None, state, control)
    callback.on_step_end(None, state, control)
    assert [(name, value) for name, value, _ in recorded if name.endswith("seconds")] == [
        ("step_seconds", 3.0),
        ("checkpoint_age_seconds", 3.0),
        ("checkpoint_seconds", 2.0),
        ("step_seconds", 4.0),
        ("checkpoint_age_seconds", 4.0),
    ]
