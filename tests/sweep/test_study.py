"""Study of a sweep, without Ray: the loss of a trial is a function of its parameters."""

from __future__ import annotations

import json
import logging
from collections.abc import Generator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.pruners import SuccessiveHalvingPruner
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.study import StudyDirection
from optuna.trial import TrialState

from mint_ray.config.loader import UserError, from_data, replace
from mint_ray.config.sweep import SweepConfig
from mint_ray.sweep.study import AskAndTell, AskedTrial, completed, open_study, study_name

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

STEPS = (1, 2, 4, 8)
SPACE = {
    "train.trainer.objective.beta": {"kind": "float", "low": 0.05, "high": 1.0, "log": True},
    "pair.sampler": {
        "kind": "choice",
        "choices": [{"kind": "hard"}, {"kind": "margin", "margin": {"kind": "float", "low": 0.01, "high": 0.3}}],
    },
}


def config(root: Path | str, **sweep: Any) -> SweepConfig:
    return from_data(
        SweepConfig,
        {
            "root": str(root),
            "task": {"kind": "rare_disease"},
            "prepare": {"source": {"kind": "hpo"}},
            "train": {"student": {"model_id": "bundled:smollm2-135m-instruct"}},
            "sweep": {
                "space": SPACE,
                "n_trials": 5,
                "search": {"kind": "tpe", "n_startup_trials": 2},
                "pruner": {"kind": "asha", "reduction_factor": 2},
                **sweep,
            },
        },
    )


def loss_of(asked: AskedTrial, step: int) -> float:
    beta = asked.changes.get("train.trainer.objective.beta", 0.3)
    sampler = asked.changes.get("pair.sampler", {})
    return (beta - 0.4) ** 2 + sampler.get("margin", 0.2) + 1.0 / step + 0.3 * (asked.number % 3) / step


def accuracy_of(asked: AskedTrial) -> float:
    return 1.0 - loss_of(asked, STEPS[-1])


def run(trials: AskAndTell, asked: AskedTrial) -> None:
    """Run one trial from start to end, with a trainer that always starts at the first validation."""
    for step in STEPS:
        if trials.report(asked.number, f"train-{asked.number}", step, loss_of(asked, step), asked.seconds + step):
            break
    else:
        metrics = {"top_k_accuracy": {"value": accuracy_of(asked), "low": 0.0, "high": 1.0}}
        trials.tell(asked.number, metrics, {"train": f"train-{asked.number}"}, asked.seconds + 10)
    trials.release(asked.number)


def run_all(trials: AskAndTell) -> None:
    while not trials.is_exhausted:
        run(trials, ask(trials))


def ask(trials: AskAndTell) -> AskedTrial:
    asked = trials.ask()
    assert asked is not None
    return asked


class Crash(Exception):
    pass


class Memory(BaseJournalBackend):
    """A journal in memory whose writer crashes after `last` entries."""

    def __init__(self, logs: list[dict[str, Any]], last: int | None = None) -> None:
        self.logs, self.last = logs, last

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        yield from json.loads(json.dumps(self.logs[log_number_from:]))

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        if self.last is not None and len(self.logs) >= self.last:
            raise Crash
        self.logs += logs


def study_in(backend: BaseJournalBackend) -> optuna.Study:
    return optuna.create_study(
        storage=JournalStorage(backend),
        study_name="s",
        load_if_exists=True,
        direction=StudyDirection.MAXIMIZE,
        pruner=SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
    )


def trials_of(study: optuna.Study) -> list[Any]:
    return [
        (trial.number, trial.state, trial.params, trial.values, trial.intermediate_values, trial.user_attrs["changes"])
        for trial in study.get_trials()
    ]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture(scope="module")
def uninterrupted() -> list[Any]:
    logs: list[dict[str, Any]] = []
    run_all(AskAndTell(study_in(Memory(logs)), config("x").sweep, 5))
    entries = len(logs)
    return [*trials_of(study_in(Memory(logs))), entries]


def test_trials_are_pruned_and_completed(uninterrupted: list[Any]) -> None:
    states = [row[1] for row in uninterrupted[:-1]]
    assert len(states) == 5
    assert {TrialState.PRUNED, TrialState.COMPLETE} == set(states)


def test_after_a_crash_at_any_entry_parameters_and_decisions_equal_those_of_an_uninterrupted_run(
    uninterrupted: list[Any],
) -> None:
    *expected, entries = uninterrupted
    sweep = config("x").sweep
    for last in range(2, entries):
        logs: list[dict[str, Any]] = []
        with pytest.raises(Crash):
            run_all(AskAndTell(study_in(Memory(logs, last)), sweep, 5))
        again = study_in(Memory(logs))
        run_all(AskAndTell(again, sweep, 5))
        assert trials_of(again) == expected, f"crashed after entry {last}"


def test_a_pruned_trial_is_told_with_its_last_value_and_never_complete(uninterrupted: list[Any]) -> None:
    pruned = [row for row in uninterrupted[:-1] if row[1] == TrialState.PRUNED]
    for _, _, _, values, intermediate, _ in pruned:
        # the metric is maximized and the loss minimized, so the loss is negated
        assert values == [intermediate[max(intermediate)]]
        assert values[0] < 0


def test_the_best_trials_are_chosen_among_complete_ones(uninterrupted: list[Any]) -> None:
    logs: list[dict[str, Any]] = []
    study = study_in(Memory(logs))
    run_all(AskAndTell(study, config("x").sweep, 5))
    best = completed(study)
    assert [trial.state for trial in best] == [TrialState.COMPLETE] * len(best)
    assert [trial.values[0] for trial in best] == sorted((trial.values[0] for trial in best), reverse=True)


def test_a_finished_sweep_has_no_trial_left_until_it_is_extended() -> None:
    logs: list[dict[str, Any]] = []
    sweep = config("x").sweep
    run_all(AskAndTell(study_in(Memory(logs)), sweep, 3))
    assert AskAndTell(study_in(Memory(logs)), sweep, 3).is_finished
    longer = AskAndTell(study_in(Memory(logs)), sweep, 5)
    run_all(longer)
    assert [trial.number for trial in longer.study.trials] == [0, 1, 2, 3, 4]


def test_trials_with_equal_parameters_do_not_run_at_the_same_time() -> None:
    sweep = config(
        "x",
        space={"train.student.lora_rank": {"kind": "choice", "choices": [4]}},
        resources={"max_concurrent": 2},
        pruner={"kind": "none"},
    ).sweep
    trials = AskAndTell(study_in(Memory([])), sweep, 2)
    first = ask(trials)
    assert trials.ask() is None
    assert not trials.is_exhausted
    run(trials, first)
    second = ask(trials)
    assert second.changes == first.changes
    run(trials, second)
    assert trials.ask() is None
    assert trials.is_finished


def test_at_most_max_concurrent_trials_run() -> None:
    trials = AskAndTell(study_in(Memory([])), config("x", resources={"max_concurrent": 2}).sweep, 5)
    ask(trials)
    ask(trials)
    assert trials.ask() is None
    trials.release(0)
    ask(trials)


def test_a_failed_trial_has_its_error_and_counts_as_a_trial() -> None:
    trials = AskAndTell(study_in(Memory([])), config("x").sweep, 2)
    first = ask(trials)
    trials.record_error(first.number, "boom")
    trials.tell_failed(first.number)
    trials.release(first.number)
    run_all(trials)
    found = trials.study.trials
    assert (found[0].state, found[0].user_attrs["error"]) == (TrialState.FAIL, "boom")
    assert len(found) == 2


def test_a_trial_without_the_metric_fails() -> None:
    trials = AskAndTell(study_in(Memory([])), config("x").sweep, 1)
    asked = ask(trials)
    trials.tell(asked.number, {"car": {"value": 0.5}}, {}, 1.0)
    assert trials.study.trials[0].state == TrialState.FAIL
    assert trials.study.trials[0].user_attrs["error"] == "metric top_k_accuracy is missing; available: car"


@pytest.mark.parametrize("kind", ["tpe", "random", "grid", "multi_objective"])
def test_every_search_runs_all_its_trials(tmp_path: Path, kind: str) -> None:
    space = {
        "train.student.lora_rank": {"kind": "int", "low": 4, "high": 12, "step": 4},
        "train.trainer.objective.beta": {"kind": "float", "low": 0.1, "high": 1.0, "num_points": 2},
        "pair.sampler": SPACE["pair.sampler"] | {"choices": [{"kind": "hard"}, {"kind": "uniform"}]},  # type: ignore[operator]
    }
    made = config(tmp_path, space=space, search={"kind": kind}, pruner={"kind": "none"}, n_trials=20)
    with open_study(made) as study:
        run_all(AskAndTell(study, made.sweep, 20))
        drawn = {json.dumps(trial.user_attrs["changes"], sort_keys=True) for trial in study.trials}
        if kind == "grid":
            assert len(study.trials) == len(drawn) == 3 * 2 * 2
        else:
            assert len(study.trials) == 20
            assert len(drawn) > 5
        directions = [StudyDirection.MAXIMIZE] + [StudyDirection.MINIMIZE] * (kind == "multi_objective")
        assert study.directions == directions


def test_equal_seeds_give_equal_parameters(tmp_path: Path) -> None:
    def draws(folder: str, seed: int) -> list[Any]:
        made = config(tmp_path / folder, search={"kind": "random", "seed": seed})
        with open_study(made) as study:
            run_all(AskAndTell(study, made.sweep, 3))
            return [trial.params for trial in study.trials]

    assert draws("a", 1) == draws("b", 1) != draws("c", 2)


def test_a_sweep_that_is_already_running_is_an_error(tmp_path: Path) -> None:
    made = config(tmp_path)
    with open_study(made), pytest.raises(UserError, match="is already running in process"), open_study(made):
        raise AssertionError("not reached")
    # another sweep in the same storage, and the same one after the first has ended
    with open_study(made), open_study(config(tmp_path, metric="car")):
        pass


def test_a_journal_with_a_partial_last_line_is_continued(tmp_path: Path) -> None:
    made = config(tmp_path)
    with open_study(made) as study:
        run_all(AskAndTell(study, made.sweep, 2))
        before = trials_of(study)
    [journal] = (tmp_path / "sweeps").glob("*.journal")
    with journal.open("ab") as stream:
        stream.write(b'{"op_code":4,"worker')
    Path(f"{journal}.lock").symlink_to(journal)
    with open_study(made) as study:
        assert trials_of(study) == before
        run_all(AskAndTell(study, made.sweep, 4))
        assert len(study.trials) == 4


def test_a_study_in_sqlite_is_continued(tmp_path: Path) -> None:
    made = config(tmp_path, storage=f"sqlite:///{tmp_path}/study.db")
    with open_study(made) as study:
        run_all(AskAndTell(study, made.sweep, 2))
    with open_study(made) as study:
        trials = AskAndTell(study, made.sweep, 3)
        run_all(trials)
        assert len(study.trials) == 3
    assert optuna.load_study(study_name=study_name(made), storage=f"sqlite:///{tmp_path}/study.db").metric_names == [
        "top_k_accuracy"
    ]


def test_no_message_contains_the_password_of_the_storage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="mint_ray")
    made = config(tmp_path, storage="postgresql://sweeper:hunter2@127.0.0.1:1/studies")
    with (
        pytest.raises(UserError, match=r"sweep\.storage: postgresql://127\.0\.0\.1:1/studies") as refused,
        open_study(made),
    ):
        raise AssertionError("not reached")
    assert "hunter2" not in str(refused.value) + caplog.text


def test_a_remote_root_needs_a_storage(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"sweep\.storage: a journal file cannot be in s3://bucket/x"),
        open_study(config("s3://bucket/x")),
    ):
        raise AssertionError("not reached")


def test_the_name_depends_on_what_affects_sampling_and_evaluation(tmp_path: Path) -> None:
    made = config(tmp_path)
    same = [
        {"sweep.n_trials": 99},
        {"sweep.storage": "x"},
        {"root": "y"},
        {"sweep.resources.max_concurrent": 3},
        {"title": "t"},
    ]
    other = [{"sweep.metric": "car"}, {"sweep.search.seed": 3}, {"train.trainer.learning_rate": 1e-5}]
    assert {study_name(replace(made, change)) for change in same} == {study_name(made)}
    assert len({study_name(replace(made, change)) for change in other} | {study_name(made)}) == len(other) + 1
