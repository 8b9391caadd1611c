from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mint_ray.metrics import Estimate
from mint_ray.reports.sweep import (
    SweepSummary,
    TrialRow,
    pareto_front,
    render_markdown,
    render_terminal,
)
from mint_ray.reports.sweep_page import render_html
from tests.reports.test_run_report import CHROMIUM, lay_out


def trial(number: int, state: str, value: float | None, seconds: float, **more: object) -> TrialRow:
    sampler = "margin" if number % 2 else "hard"
    parameters = {"train.trainer.objective.beta": 0.1 * (number + 1), "pair.sampler": sampler}
    if sampler == "margin":
        parameters["pair.sampler[margin].margin"] = 0.02 * number
    return TrialRow(
        number=number, state=state, value=value, worker_seconds=seconds, parameters=parameters,
        changes={"train.trainer.objective.beta": 0.1 * (number + 1), "pair.sampler": {"kind": sampler}},
        curve=[(1, 3.0), (2, 2.0 + number / 10)], **more,
    )  # type: ignore[arg-type]  # fmt: skip


SUMMARY = SweepSummary(
    title="A <b>sweep</b>",
    metric="top_10_accuracy",
    direction="maximize",
    trials=[
        trial(0, "complete", 0.4, 100),
        trial(1, "complete", 0.6, 120),
        trial(2, "pruned", None, 30),
        trial(3, "fail", None, 5, error="UserError: no pairs | to <train> on"),
        trial(4, "complete", 0.5, 200),
    ],
    importance={"pair.sampler": 0.7, "train.trainer.objective.beta": 0.3},
    data_side=["pair.sampler", "pair.sampler[margin].margin"],
    curve_metric="nll_loss",
    default_value=0.3,
    seeds={1: [0.6, 0.55, 0.5], 4: [0.5, 0.52]},
    winner=1,
    methods={
        "aligned student, default": {"top_10_accuracy": Estimate(0.3, 0.2, 0.4)},
        "aligned student, winner": {"top_10_accuracy": Estimate(0.55, 0.4, 0.7)},
    },
    prunes=True,
    config={"sweep": {"metric": "top_10_accuracy"}},
    study="sweep-0123456789ab",
)


def text_of(html: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", html.partition("<body>")[2]).split())


def test_the_page_says_what_was_tried_what_mattered_and_what_it_cost() -> None:
    page = text_of(render_html(SUMMARY))
    assert "0.55 [0.40, 0.70]" in page
    assert "0.30 [0.20, 0.40]" in page
    assert "1 (winner)" in page
    assert "pair.sampler data 0.70" in page
    assert "train.trainer.objective.beta training 0.30" in page
    # the two that ran to their end at 100 and 120 and 200 seconds: 140 on average, 30 of which were spent
    assert "Giving trials up spared 1 min 50 s" in page
    assert "trials 0, 1" in page
    assert "no pairs | to &lt;train&gt; on" in page


def test_the_page_runs_nothing_asks_for_nothing_and_is_the_same_each_time() -> None:
    page = render_html(SUMMARY)
    assert page == render_html(SUMMARY)
    assert "<b>sweep</b>" not in page
    assert not re.search(r"<script|https?://|src=|@import|url\((?!#)", page)

    class Balanced(HTMLParser):
        open: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "br", "path", "use", "rect", "circle", "line"):
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag in self.open:
                assert self.open.pop() == tag

    parser = Balanced()
    parser.feed(page)
    assert parser.open == []


def test_every_plot_is_there() -> None:
    page = render_html(SUMMARY)
    for label in (
        "Importance of every parameter",
        "Parameters and value of every trial",
        "Quality against worker-seconds",
        "Validation nll_loss over steps",
        "The best trials over training seeds",
    ):
        assert f'aria-label="{label}"' in page
    assert "Quality against GPU-seconds" in render_html(dataclasses.replace(SUMMARY, gpus=True))


def test_markdown_and_terminal_tell_the_same() -> None:
    markdown, terminal = render_markdown(SUMMARY), render_terminal(SUMMARY)
    for said in ("5 trials: 3 ran to their end, 1 given up, 1 raised", "0.55 [0.40, 0.70]"):
        assert said in markdown
        assert said in terminal
    assert "| 3 | UserError: no pairs \\| to &lt;train&gt; on |" in markdown
    assert "trial 3 raised: UserError: no pairs | to <train> on" in terminal
    assert max(map(len, terminal.splitlines())) <= 100


def test_the_best_come_first_whichever_way_is_better() -> None:
    assert [row.number for row in SUMMARY.best] == [1, 4, 0]
    assert [row.number for row in dataclasses.replace(SUMMARY, direction="minimize").best] == [0, 4, 1]


def test_the_front_holds_what_nothing_beats_in_both() -> None:
    rows = SUMMARY.best
    # 4 costs more than 1 and is worse
    assert [row.number for row in pareto_front(rows, "maximize")] == [0, 1]
    assert [row.number for row in pareto_front(rows, "minimize")] == [0]


@pytest.mark.parametrize("trials", [[], [trial(0, "fail", None, 1, error="x")], [trial(0, "complete", 0.5, 1)]])
def test_a_sweep_of_few_trials_has_a_page_too(trials: list[TrialRow]) -> None:
    few = dataclasses.replace(SUMMARY, trials=trials, importance={}, seeds={0: [0.5]}, methods={})
    assert "Too few trials" in render_html(few)
    render_markdown(few)
    render_terminal(few)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed to lay the page out")
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_hangs_over_the_edge_of_the_screen(tmp_path: Path, width: int) -> None:
    long = "x" * 200
    changes = {"pair.sampler": {"kind": long}, "train.trainer.objective.beta": 0.123456789}
    wide = dataclasses.replace(
        SUMMARY,
        metric="mean_reciprocal_rank",
        trials=[dataclasses.replace(row, changes=changes) for row in SUMMARY.trials],
        importance={long: 1.0},
        config={long: long},
    )
    scroll, client, high = lay_out(render_html(wide).replace("<details>", "<details open>"), width, tmp_path)
    assert client > width - 30
    assert high > 1000, "the page was laid out"
    assert scroll <= client
