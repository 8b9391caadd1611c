"""Tables and text forms of the report of a sweep."""

from __future__ import annotations

import dataclasses

import pytest

from mint_ray.reports.sweep import (
    TrialRow,
    importance_table,
    pareto_front,
    render_markdown,
    render_terminal,
    seed_table,
    trials_sentence,
)
from tests.reports.summaries import SWEEP, trial


def test_markdown_and_terminal_agree() -> None:
    markdown, terminal = render_markdown(SWEEP), render_terminal(SWEEP)
    for word in ("5 trials: 3 complete, 1 pruned, 1 failed", "0.55 [0.40, 0.70]", "Top-3 accuracy", "1 (winner)"):
        assert word in markdown
        assert word in terminal
    assert "| 3 | failed | 5 | 2 | UserError: no pairs \\| to &lt;train&gt; on |" in markdown
    assert "trial 3 failed: UserError: no pairs | to <train> on" in terminal
    assert max(map(len, terminal.splitlines())) <= 100


def test_pruning_saves_the_difference_to_the_mean_cost_of_complete_trials() -> None:
    # three complete trials of 100, 120 and 200 seconds: 140 on average, of which the pruned trial spent 30
    assert "pruning saved about 110" in trials_sentence(SWEEP)
    assert "pruning" not in trials_sentence(dataclasses.replace(SWEEP, trials=SWEEP.trials[:2]))


def test_best_trials_come_first_in_either_direction() -> None:
    assert [row.number for row in SWEEP.best] == [1, 4, 0]
    assert [row.number for row in dataclasses.replace(SWEEP, direction="minimize").best] == [0, 4, 1]


def test_no_trial_beats_one_of_the_pareto_front_in_both_value_and_cost() -> None:
    # trial 4 costs more than trial 1 and is worse
    assert [row.number for row in pareto_front(SWEEP.best, "maximize")] == [0, 1]
    assert [row.number for row in pareto_front(SWEEP.best, "minimize")] == [0]


def test_importance_names_the_part_of_each_parameter() -> None:
    table = importance_table(SWEEP)
    assert table is not None
    assert [[str(cell) for cell in row] for row in table.rows] == [
        ["pair.sampler", "data", "0.70"],
        ["train.trainer.objective.beta", "training", "0.30"],
    ]


def test_finalists_have_mean_and_range_over_seeds() -> None:
    table = seed_table(SWEEP)
    assert table is not None
    assert [str(cell) for cell in table.rows[0]] == ["1", "3", "0.550", "0.500", "0.600"]
    assert seed_table(dataclasses.replace(SWEEP, seeds={1: [0.6]})) is None


@pytest.mark.parametrize("trials", [[], [trial(0, "fail", None, 1, error="x")], [trial(0, "complete", 0.5, 1)]])
def test_a_sweep_of_few_trials_has_a_report(trials: list[TrialRow]) -> None:
    few = dataclasses.replace(SWEEP, trials=trials, importance={}, seeds={0: [0.5]}, tested={})
    assert importance_table(few) is None
    for text in (render_markdown(few), render_terminal(few)):
        assert f"{len(trials)} trials" in text
