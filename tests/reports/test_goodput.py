"""Resource accounting of a run as a table and a sentence."""

from __future__ import annotations

import dataclasses

from mint_ray.reports import render_html, render_markdown, render_terminal
from mint_ray.reports.goodput import goodput_sentence, goodput_table
from mint_ray.runtime.goodput import Goodput
from tests.reports.pages import Page
from tests.reports.summaries import RUN


def test_the_sentence_has_the_shares_of_allocated_seconds() -> None:
    # 10,000 CPU seconds, 8,000 of them productive; 1,400 GPU seconds
    assert goodput_sentence(RUN.goodput) == (
        "10,000 CPU seconds, 80% productive, 10% start-up, 7% lost, 3% idle; 1,400 GPU seconds, 86% productive, "
        "7% start-up, 7% lost, 0% idle; 1 min 05 s waiting for resources"
    )
    assert "allocated: 10,000 CPU seconds, 80% productive" in " ".join(render_terminal(RUN).split())


def test_markdown_and_page_contain_the_table() -> None:
    rows = [
        ["score", "1", "48 s", "4.0 s", "1,600", "400", "800", "100", "300"],
        ["train", "2", "2 h 01 min", "1 min 01 s", "8,400", "600", "7,200", "600", "0"],
        ["train, GPUs", "", "", "", "1,400", "100", "1,200", "100", "0"],
        ["total", "3", "2 h 02 min", "1 min 05 s", "10,000", "1,000", "8,000", "700", "300"],
        ["total, GPUs", "", "", "", "1,400", "100", "1,200", "100", "0"],
    ]
    markdown, page = render_markdown(RUN), Page(render_html(RUN)).text
    for row in rows:
        assert "| " + " | ".join(row) + " |" in markdown
        assert " ".join(filter(None, row)) in page


def test_a_run_that_allocated_nothing_has_no_accounting() -> None:
    goodput = {"prepare": Goodput(attempts=1, wall_seconds=3.0)}
    assert goodput_table(goodput) is None
    assert goodput_sentence(goodput) == ""
    nothing = dataclasses.replace(RUN, goodput=goodput)
    assert "allocated" not in render_terminal(nothing) + render_markdown(nothing) + Page(render_html(nothing)).text
