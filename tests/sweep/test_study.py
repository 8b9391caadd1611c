"""The record of a sweep, driven without Ray by trials whose curves follow from what was drawn."""

from __future__ import annotations

import fcntl
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
from mint_ray.sweep.lock import HOLDER, hold_study
from mint_ray.sweep.study import FINISHED, Drawn, Ledger, completed, open_study, study_name

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

STEPS = (1, 2, 4, 8)
SPACE = {
    "train.trainer.objective.beta": {"kind": "float", "low": 0.05, "high": 1.0, "log": True},
    "pair.sampler": {
        "kind": "choice",
        "of": [{"kind": "hard"}, {"kind": "margin", "margin": {"kind": "float", "low": 0.01, "high": 0.3}}],
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
                "trials": 5,
                "search": {"kind": "tpe", "startup_trials": 2},
                "pruner": {"kind": "asha", "reduction_factor": 2},
                **sweep,
            },
        },
    )


def loss_of(drawn: Drawn, step: int) -> float:
    beta = drawn.changes.get("train.trainer.objective.beta", 0.3)
    sampler = drawn.changes.get("pair.sampler", {})
    return (beta - 0.4) ** 2 + sampler.get("margin", 0.2) + 1.0 / step + 0.3 * (drawn.number % 3) / step


def accuracy_of(drawn: Drawn) -> float:
    return 1.0 - loss_of(drawn, STEPS[-1])


def run(ledger: Ledger, drawn: Drawn) -> None:
    """One trial from start to end, as a trainer would tell of it that always begins at the first validation."""
    for step in STEPS:
        if ledger.evaluated(drawn.number, f"train-{drawn.number}", step, loss_of(drawn, step), drawn.seconds + step):
            break
    else:
        metrics = {"top_10_accuracy": {"value": accuracy_of(drawn), "low": 0.0, "high": 1.0}}
        ledger.finished(drawn.number, metrics, {"train": f"train-{drawn.number}"}, drawn.seconds + 10)
    ledger.closed(drawn.number)


def run_all(ledger: Ledger) -> None:
    while not isinstance(drawn := ledger.next(), str):
        assert drawn is not None
        run(ledger, drawn)


class Crash(Exception):
    pass


class Memory(BaseJournalBackend):
    """A journal whose writer dies when it has written `last` entries."""

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


def told(study: optuna.Study) -> list[Any]:
    return [
        (trial.number, trial.state, trial.params, trial.values, trial.intermediate_values, trial.user_attrs["changes"])
        for trial in study.get_trials()
    ]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture(scope="module")
def unbroken() -> list[Any]:
    logs: list[dict[str, Any]] = []
    run_all(Ledger(study_in(Memory(logs)), config("x").sweep, 5))
    entries = len(logs)
    return [*told(study_in(Memory(logs))), entries]


def test_trials_are_given_up_and_finished(unbroken: list[Any]) -> None:
    states = [row[1] for row in unbroken[:-1]]
    assert len(states) == 5
    assert {TrialState.PRUNED, TrialState.COMPLETE} == set(states)


def test_after_a_crash_at_any_entry_draws_and_decisions_are_those_of_an_unbroken_run(unbroken: list[Any]) -> None:
    *expected, entries = unbroken
    sweep = config("x").sweep
    for last in range(2, entries):
        logs: list[dict[str, Any]] = []
        with pytest.raises(Crash):
            run_all(Ledger(study_in(Memory(logs, last)), sweep, 5))
        again = study_in(Memory(logs))
        run_all(Ledger(again, sweep, 5))
        assert told(again) == expected, f"died at entry {last}"


def test_a_trial_given_up_is_told_pruned_with_its_last_value_and_never_complete(unbroken: list[Any]) -> None:
    pruned = [row for row in unbroken[:-1] if row[1] == TrialState.PRUNED]
    for _, _, _, values, intermediate, _ in pruned:
        # the metric is to rise and the loss to fall: it is compared turned round
        assert values == [intermediate[max(intermediate)]]
        assert values[0] < 0


def test_the_best_is_chosen_among_those_that_ran_to_their_end(unbroken: list[Any]) -> None:
    logs: list[dict[str, Any]] = []
    study = study_in(Memory(logs))
    run_all(Ledger(study, config("x").sweep, 5))
    best = completed(study)
    assert [trial.state for trial in best] == [TrialState.COMPLETE] * len(best)
    assert [trial.values[0] for trial in best] == sorted((trial.values[0] for trial in best), reverse=True)


def test_a_finished_sweep_hands_out_nothing_until_it_is_extended() -> None:
    logs: list[dict[str, Any]] = []
    sweep = config("x").sweep
    run_all(Ledger(study_in(Memory(logs)), sweep, 3))
    assert Ledger(study_in(Memory(logs)), sweep, 3).is_finished
    longer = Ledger(study_in(Memory(logs)), sweep, 5)
    run_all(longer)
    assert [trial.number for trial in longer.study.trials] == [0, 1, 2, 3, 4]


def test_trials_that_drew_the_same_wait_for_each_other() -> None:
    sweep = config(
        "x",
        space={"train.student.lora_rank": {"kind": "choice", "of": [4]}},
        resources={"max_concurrent": 2},
        pruner={"kind": "none"},
    ).sweep
    ledger = Ledger(study_in(Memory([])), sweep, 2)
    first = ledger.next()
    assert isinstance(first, Drawn)
    assert ledger.next() is None
    run(ledger, first)
    second = ledger.next()
    assert isinstance(second, Drawn)
    assert second.changes == first.changes
    run(ledger, second)
    assert ledger.next() == FINISHED


def test_no_more_than_so_many_at_a_time() -> None:
    ledger = Ledger(study_in(Memory([])), config("x", resources={"max_concurrent": 2}).sweep, 5)
    drawn = [ledger.next(), ledger.next()]
    assert all(isinstance(one, Drawn) for one in drawn)
    assert ledger.next() is None
    ledger.closed(0)
    assert isinstance(ledger.next(), Drawn)


def test_what_raised_is_failed_with_its_error_and_keeps_its_place() -> None:
    ledger = Ledger(study_in(Memory([])), config("x").sweep, 2)
    first = ledger.next()
    assert isinstance(first, Drawn)
    ledger.raised(first.number, "boom")
    ledger.failed(first.number)
    ledger.closed(first.number)
    run_all(ledger)
    trials = ledger.study.trials
    assert (trials[0].state, trials[0].user_attrs["error"]) == (TrialState.FAIL, "boom")
    assert len(trials) == 2


def test_a_trial_without_the_metric_fails() -> None:
    ledger = Ledger(study_in(Memory([])), config("x").sweep, 1)
    drawn = ledger.next()
    assert isinstance(drawn, Drawn)
    ledger.finished(drawn.number, {"car": {"value": 0.5}}, {}, 1.0)
    assert ledger.study.trials[0].state == TrialState.FAIL
    assert ledger.study.trials[0].user_attrs["error"] == "no top_10_accuracy; there are car"


@pytest.mark.parametrize("kind", ["tpe", "random", "grid", "multi_objective"])
def test_every_search_fills_its_study(tmp_path: Path, kind: str) -> None:
    space = {
        "train.student.lora_rank": {"kind": "int", "low": 4, "high": 12, "step": 4},
        "train.trainer.objective.beta": {"kind": "float", "low": 0.1, "high": 1.0, "points": 2},
        "pair.sampler": SPACE["pair.sampler"] | {"of": [{"kind": "hard"}, {"kind": "uniform"}]},  # type: ignore[operator]
    }
    made = config(tmp_path, space=space, search={"kind": kind}, pruner={"kind": "none"}, trials=20)
    with open_study(made) as study:
        run_all(Ledger(study, made.sweep, 20))
        drawn = {json.dumps(trial.user_attrs["changes"], sort_keys=True) for trial in study.trials}
        if kind == "grid":
            assert len(study.trials) == len(drawn) == 3 * 2 * 2
        else:
            assert len(study.trials) == 20
            assert len(drawn) > 5
        directions = [StudyDirection.MAXIMIZE] + [StudyDirection.MINIMIZE] * (kind == "multi_objective")
        assert study.directions == directions


def test_the_same_seed_draws_the_same_and_another_seed_others(tmp_path: Path) -> None:
    def draws(folder: str, seed: int) -> list[Any]:
        made = config(tmp_path / folder, search={"kind": "random", "seed": seed})
        with open_study(made) as study:
            run_all(Ledger(study, made.sweep, 3))
            return [trial.params for trial in study.trials]

    assert draws("a", 1) == draws("b", 1) != draws("c", 2)


def test_a_sweep_that_another_runs_is_refused(tmp_path: Path) -> None:
    made = config(tmp_path)
    with open_study(made), pytest.raises(UserError, match="is being run already, by process"), open_study(made):
        raise AssertionError("not reached")
    # another sweep in the same store, and the same one once it is free
    with open_study(made), open_study(config(tmp_path, metric="car")):
        pass


def test_a_lock_that_no_living_process_holds_is_no_hindrance(tmp_path: Path) -> None:
    made = config(tmp_path)
    with open_study(made):
        [held] = (tmp_path / "sweeps").glob("*.held")
    with held.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open_study(made) as study:
        assert study.trials == []


def test_a_journal_cut_off_in_the_middle_of_a_line_is_gone_on_with(tmp_path: Path) -> None:
    made = config(tmp_path)
    with open_study(made) as study:
        run_all(Ledger(study, made.sweep, 2))
        before = told(study)
    [journal] = (tmp_path / "sweeps").glob("*.journal")
    with journal.open("ab") as stream:
        stream.write(b'{"op_code":4,"worker')
    Path(f"{journal}.lock").symlink_to(journal)
    with open_study(made) as study:
        assert told(study) == before
        run_all(Ledger(study, made.sweep, 4))
        assert len(study.trials) == 4


def test_a_study_in_sqlite_is_gone_on_with(tmp_path: Path) -> None:
    made = config(tmp_path, store=f"sqlite:///{tmp_path}/study.db")
    with open_study(made) as study:
        run_all(Ledger(study, made.sweep, 2))
    with open_study(made) as study:
        ledger = Ledger(study, made.sweep, 3)
        run_all(ledger)
        assert len(study.trials) == 3
    assert optuna.load_study(study_name=study_name(made), storage=f"sqlite:///{tmp_path}/study.db").metric_names == [
        "top_10_accuracy"
    ]


def test_a_study_that_machines_share_is_held_by_a_sign_of_life_and_let_go_when_that_is_old(tmp_path: Path) -> None:
    def load() -> optuna.Study:
        return optuna.create_study(storage=f"sqlite:///{tmp_path}/s.db", study_name="s", load_if_exists=True)

    with hold_study(load(), "s"):
        with pytest.raises(UserError, match="s is being run already, by process"), hold_study(load(), "s"):
            raise AssertionError("not reached")
        left = load().user_attrs[HOLDER]
    assert load().user_attrs[HOLDER] is None
    # what a process leaves that was killed two minutes ago
    load().set_user_attr(HOLDER, left | {"seen": left["seen"] - 120})
    with hold_study(load(), "s"):
        pass


def test_a_password_in_the_store_is_in_no_message(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="mint_ray")
    made = config(tmp_path, store="postgresql://sweeper:hunter2@127.0.0.1:1/studies")
    with (
        pytest.raises(UserError, match=r"sweep\.store: postgresql://127\.0\.0\.1:1/studies") as refused,
        open_study(made),
    ):
        raise AssertionError("not reached")
    assert "hunter2" not in str(refused.value) + caplog.text


def test_a_remote_root_needs_a_store(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"sweep\.store: a journal cannot lie in s3://bucket/x"),
        open_study(config("s3://bucket/x")),
    ):
        raise AssertionError("not reached")


def test_the_name_is_that_of_what_is_drawn_and_judged(tmp_path: Path) -> None:
    made = config(tmp_path)
    same = [
        {"sweep.trials": 99},
        {"sweep.store": "x"},
        {"root": "y"},
        {"sweep.resources.max_concurrent": 3},
        {"title": "t"},
    ]
    other = [{"sweep.metric": "car"}, {"sweep.search.seed": 3}, {"train.trainer.learning_rate": 1e-5}]
    assert {study_name(replace(made, change)) for change in same} == {study_name(made)}
    assert len({study_name(replace(made, change)) for change in other} | {study_name(made)}) == len(other) + 1
