"""Settings of a sweep: validation, renamed keys, and the pipeline without the sweep."""

from __future__ import annotations

from typing import Any

import pytest

from mint_ray.config.loader import UserError, dump, from_data
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.config.sweep import Asha, SweepConfig

BASE: dict[str, Any] = {
    "task": {"kind": "rare_disease"},
    "prepare": {"source": {"kind": "hpo"}},
    "train": {"student": {"model_id": "bundled:smollm2-135m-instruct"}},
}
RANGE = {"kind": "float", "low": 0.1, "high": 1.0}


def config(**sweep: Any) -> SweepConfig:
    return from_data(SweepConfig, {**BASE, "sweep": {"space": {"train.trainer.objective.beta": RANGE}, **sweep}})


def test_the_pipeline_is_the_config_without_the_sweep() -> None:
    pipeline = config().pipeline
    assert type(pipeline) is PipelineConfig
    assert pipeline == from_data(PipelineConfig, BASE)


def test_a_config_can_be_read_back() -> None:
    made = config(pruner={"kind": "asha", "grace_period": 4}, search={"kind": "grid"})
    assert from_data(SweepConfig, dump(made)) == made


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"best": 2}, r"sweep\.best: unknown key \(got 2\); did you mean 'finalists'\?"),
        ({"seeds": 2}, r"sweep\.seeds: unknown key \(got 2\); did you mean 'num_seeds'\?"),
        ({"trials": 2}, r"sweep\.trials: unknown key \(got 2\); did you mean 'n_trials'\?"),
        ({"store": "x"}, r"sweep\.store: unknown key \(got 'x'\); did you mean 'storage'\?"),
        ({"resources": {"concurrent": 2}}, r"sweep\.resources\.concurrent: .* did you mean 'max_concurrent'\?"),
        (
            {"pruner": {"kind": "asha", "first_step": 4}},
            r"sweep\.pruner\.first_step: unknown key \(got 4\); did you mean 'grace_period'\?",
        ),
        (
            {"search": {"kind": "tpe", "startup_trials": 4}},
            r"sweep\.search\.startup_trials: .* did you mean 'n_startup_trials'\?",
        ),
        (
            {"search": {"kind": "multi_objective", "startup_trials": 4}},
            r"sweep\.search\.startup_trials: .* did you mean 'n_startup_trials'\?",
        ),
        ({"space": {"x": {**RANGE, "points": 3}}}, r"sweep\.space\.x\.points: .* did you mean 'num_points'\?"),
        ({"space": {"x": {"kind": "choice", "of": [1]}}}, r"sweep\.space\.x\.of: .* did you mean 'choices'\?"),
    ],
)
def test_a_renamed_key_gives_an_error_that_names_the_new_one(sweep: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**sweep)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"space": {}}, "space must contain at least one path, got none"),
        ({"n_trials": 0}, "n_trials must be positive, got 0"),
        ({"finalists": 0}, "finalists must be positive and num_seeds not negative, got 0 and 2"),
        ({"num_seeds": -1}, "finalists must be positive and num_seeds not negative, got 2 and -1"),
        ({"search": {"kind": "multi_objective"}, "pruner": {"kind": "asha"}}, "has no single metric to prune by"),
        ({"pruner": {"kind": "asha", "grace_period": 0}}, "grace_period must be positive, got 0"),
        ({"pruner": {"kind": "asha", "reduction_factor": 1}}, "reduction_factor must be at least 2, got 1"),
        ({"space": {"x": {**RANGE, "num_points": 1}}}, "num_points must be at least 2, got 1"),
        ({"space": {"x": {"kind": "int", "low": 1, "high": 4, "step": 0}}}, "step must be positive, got 0"),
        (
            {"space": {"x": {"kind": "int", "low": 1, "high": 4, "step": 2, "log": True}}},
            "step must be 1 if log is true",
        ),
        ({"space": {"x": {"kind": "choice", "choices": []}}}, "choices must contain at least one value, got none"),
    ],
)
def test_an_invalid_sweep_is_an_error(sweep: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**sweep)


def test_a_loss_is_minimized_and_other_metrics_are_maximized() -> None:
    assert Asha(metric="nll_loss").direction == "minimize"
    assert Asha(metric="rewards/accuracies").direction == "maximize"
