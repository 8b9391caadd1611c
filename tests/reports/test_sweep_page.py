"""The HTML page of a sweep: content, plots, reproducibility and layout."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mint_ray.reports.sweep import TrialRow
from mint_ray.reports.sweep_page import render_html
from tests.reports.pages import CHROMIUM, Page, lay_out
from tests.reports.summaries import SWEEP, trial


def test_the_page_contains_trials_importance_costs_and_the_test_split() -> None:
    page = Page(render_html(SWEEP)).text
    for word in (
        "0.55 [0.40, 0.70]", "0.30 [0.20, 0.40]", "1 (winner)", "pair.sampler data 0.70",
        "train.trainer.objective.beta training 0.30", "pruning saved about 110", "trials 0, 1",
        "no pairs | to <train> on", "Optuna study sweep-0123456789ab",
    ):  # fmt: skip
        assert word in page


def test_the_page_loads_nothing_is_reproducible_and_has_balanced_tags() -> None:
    page = render_html(SWEEP)
    assert page == render_html(SWEEP)
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


def test_every_plot_is_on_the_page() -> None:
    page = render_html(SWEEP)
    for label in (
        "Importance of every parameter",
        "Parameters and value of every trial",
        "Metric against worker-seconds",
        "Validation nll_loss over steps",
        "Finalists over training seeds",
    ):
        assert f'aria-label="{label}"' in page
    assert "Metric against GPU-seconds" in render_html(dataclasses.replace(SWEEP, uses_gpus=True))


@pytest.mark.parametrize("trials", [[], [trial(0, "fail", None, 1, error="x")], [trial(0, "complete", 0.5, 1)]])
def test_a_sweep_of_few_trials_has_a_page(trials: list[TrialRow]) -> None:
    few = dataclasses.replace(SWEEP, trials=trials, importance={}, seeds={0: [0.5]}, tested={})
    assert "Too few trials are complete" in render_html(few)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed to lay out the page")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_does_not_scroll_sideways(tmp_path: Path, width: int) -> None:
    long = "x" * 200
    changes = {"pair.sampler": {"kind": long}, "train.trainer.objective.beta": 0.123456789}
    wide = dataclasses.replace(
        SWEEP,
        metric="mean_reciprocal_rank",
        trials=[dataclasses.replace(row, changes=changes) for row in SWEEP.trials],
        importance={long: 1.0},
        config={long: long},
    )
    scroll, client, height = lay_out(render_html(wide).replace("<details>", "<details open>"), width, tmp_path)
    assert client > width - 30
    assert height > 1000, "the page was laid out"
    assert scroll <= client
