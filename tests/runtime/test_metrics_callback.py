from __future__ import annotations

import math
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from mint_ray.runtime.metrics_callback import Meter
from mint_ray.telemetry import METRICS

Told = list[tuple[str, float, dict[str, str]]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """What the meter tells, in order; Prometheus itself is in tests/dashboards."""
    found: Told = []

    def record(name: str, value: float, **tags: str) -> None:
        assert set(tags) == set(METRICS[name].tags)
        found.append((name, value, tags))

    monkeypatch.setattr("mint_ray.runtime.metrics_callback.record_metric", record)
    return found


def log(meter: Meter, **logs: float) -> None:
    state, control = TrainerState(), TrainerControl()
    meter.on_log(None, state, control, logs=logs)


def test_a_loss_that_is_no_number_is_counted_and_not_shown(told: Told) -> None:
    log(Meter("train-1"), **{"loss": math.nan, "eval_loss": math.inf, "nll_loss": 2.0})
    assert told == [
        ("nonfinite_losses", 1, {"run": "train-1", "split": "train"}),
        ("nonfinite_losses", 1, {"run": "train-1", "split": "validation"}),
        ("nll_loss", 2.0, {"run": "train-1", "split": "train"}),
    ]


def test_a_log_is_told_under_our_names_by_split_and_the_rest_is_left_out(told: Told) -> None:
    logs: dict[str, Any] = {"loss": 1.0, "rewards/accuracies": 0.5, "learning_rate": 1e-4, "grad_norm": 3.0}
    log(Meter("train-1"), **logs, **{"eval_log_odds_ratio": -0.5, "eval_runtime": 9.0})
    train, validation = {"run": "train-1", "split": "train"}, {"run": "train-1", "split": "validation"}
    assert told == [
        ("loss", 1.0, train),
        ("rewards_accuracies", 0.5, train),
        ("log_odds_ratio", -0.5, validation),
        ("grad_norm", 3.0, {"run": "train-1"}),
    ]


def test_a_run_that_goes_on_tells_of_its_own_tokens_alone(told: Told) -> None:
    meter, state, control = Meter("train-1"), TrainerState(num_input_tokens_seen=700), TrainerControl()
    meter.on_train_begin(None, state, control)
    for seen in (800, 950):
        state.num_input_tokens_seen = seen
        meter.on_step_end(None, state, control)
    assert [value for name, value, _ in told if name == "tokens_trained"] == [100, 150]


def test_seconds_go_to_the_step_or_to_the_checkpoint(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    # made, begun; the step ends, its log, its validation; saved; the next step ends
    now = iter([0.0, 10.0, 13.0, 13.5, 20.0, 22.0, 26.0])
    monkeypatch.setattr("mint_ray.runtime.metrics_callback.time.monotonic", lambda: next(now))
    meter, state, control = Meter("train-1"), TrainerState(), TrainerControl()
    meter.on_train_begin(None, state, control)
    meter.on_step_end(None, state, control)
    log(meter)
    meter.on_evaluate(None, state, control)
    meter.on_save(None, state, control)
    meter.on_step_end(None, state, control)
    assert [(name, value) for name, value, _ in told if name.endswith("seconds")] == [
        ("step_seconds", 3.0),
        ("checkpoint_age_seconds", 3.0),
        ("checkpoint_seconds", 2.0),
        ("step_seconds", 4.0),
        ("checkpoint_age_seconds", 4.0),
    ]
