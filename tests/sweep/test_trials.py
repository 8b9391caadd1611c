"""Search algorithm and scheduler of Ray Tune on top of the study, without Ray.

Trials in a cluster are tested in tests/sweep/test_run.py.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.trial import TrialState
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from mint_ray.config.sweep import Asha, NoPruner
from mint_ray.sweep.study import AskAndTell
from mint_ray.sweep.trials import StudyScheduler, StudySearcher, clear_runs, rung_metric
from tests.sweep.test_study import Memory, config, study_in

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


@pytest.fixture
def trials() -> AskAndTell:
    return AskAndTell(study_in(Memory([])), config("x").sweep, 1)


def start(trials: AskAndTell) -> tuple[StudySearcher, Any]:
    searcher = StudySearcher(trials, config("x").pipeline)
    suggested = searcher.suggest("a")
    assert isinstance(suggested, dict)
    return searcher, SimpleNamespace(config=suggested)


def test_a_trial_gets_the_resolved_config_and_no_further_one_starts(trials: AskAndTell) -> None:
    searcher, trial = start(trials)
    job, changes = trial.config["job"], trials.running[0].changes
    assert job.config.train.trainer.objective.beta == changes["train.trainer.objective.beta"]
    assert job.metric == "nll_loss"
    assert pickle.loads(pickle.dumps(job)) == job  # noqa: S301  # how Ray sends it to the actor
    assert searcher.suggest("b") == Searcher.FINISHED


def test_a_result_completes_the_trial(trials: AskAndTell) -> None:
    searcher, trial = start(trials)
    scheduler = StudyScheduler(trials)
    rung = {"rung": 1.0, "step": 1, "run": "train-1", "cost": 2.0}
    assert scheduler.on_trial_result(None, trial, rung) == TrialScheduler.CONTINUE
    metrics = {"top_k_accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}}
    result = {"metrics": json.dumps(metrics), "artifacts": json.dumps({"train": "train-1"}), "cost": 3.0}
    assert scheduler.on_trial_result(None, trial, result) == TrialScheduler.CONTINUE
    searcher.on_trial_complete("a")
    [found] = trials.study.trials
    assert (found.state, found.value, found.user_attrs["worker_seconds"]) == (TrialState.COMPLETE, 0.5, 3.0)
    assert trials.is_finished


def test_an_error_is_recorded_on_one_line_and_a_second_one_fails_the_trial(trials: AskAndTell, tmp_path: Path) -> None:
    searcher, trial = start(trials)
    trial.error_file = tmp_path / "error.txt"
    trial.error_file.write_text(
        'Failure # 1\nTraceback (most recent call last):\n  File "x.py", line 3, in f\nValueError: no pairs\n'
    )
    StudyScheduler(trials).on_trial_error(None, trial)
    searcher.on_trial_complete("a", error=True)
    [found] = trials.study.trials
    assert (found.state, found.user_attrs["error"]) == (TrialState.FAIL, "ValueError: no pairs")


def test_pickles_contain_no_study(trials: AskAndTell) -> None:
    assert StudySearcher(trials, config("x").pipeline).__getstate__() == {}
    assert StudyScheduler(trials).__getstate__() == {}


def test_checkpoints_of_failed_trials_are_removed(trials: AskAndTell, tmp_path: Path) -> None:
    _, trial = start(trials)
    checkpoint = tmp_path / "runs" / "train-1" / "checkpoint"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("")
    StudyScheduler(trials).on_trial_result(None, trial, {"rung": 1.0, "step": 1, "run": "train-1", "cost": 2.0})
    clear_runs(str(tmp_path), trials)
    assert checkpoint.exists()
    trials.tell_failed(0)
    clear_runs(str(tmp_path), trials)
    assert not checkpoint.exists()


def test_the_metric_of_rungs_is_that_of_the_pruner() -> None:
    assert rung_metric(config("x", pruner=vars(Asha(metric="loss"))).sweep) == "loss"
    assert rung_metric(config("x", pruner=vars(NoPruner())).sweep) == "nll_loss"
