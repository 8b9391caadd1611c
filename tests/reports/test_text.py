"""The report of a run as plain text and as Markdown."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest

from mint_ray.metrics import METRICS, Estimate
from mint_ray.records import Method
from mint_ray.reports import MethodResult, RunSummary, render_markdown, render_terminal
from mint_ray.reports.tables import estimate_cell
from tests.reports.pages import HOSTILE
from tests.reports.summaries import RUN, estimates

RENDERERS = (render_terminal, render_markdown)


def result(student: Any, **found: Estimate) -> MethodResult:
    return MethodResult(method=Method(student=student), estimates=found)


@pytest.mark.parametrize("render", RENDERERS)
def test_each_form_contains_every_estimate_note_and_the_warning(render: Any) -> None:
    text = render(RUN)
    for title, found in RUN.estimates.items():
        assert all(word in text for word in title.split())
        assert all(str(estimate_cell(estimate)) in text for estimate in found.values())
    for word in ("Top-3 accuracy", "Facial terms stand in for the photograph.", "95 %", "Research use only"):
        assert word in text


def test_the_terminal_form_has_counts_and_dropped_rows_in_100_columns_without_colour(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    fifth = MethodResult(method=Method(student="aligned", retrieval=True, mode="constrained"), estimates=estimates(0.2))
    text = render_terminal(dataclasses.replace(RUN, methods=[*RUN.methods, fifth]))
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text
    for line in ("prepare: train 4,312, validation 517", "prepare, dropped: no_label 41"):
        assert line in text
    assert "alignment: 281 records became right, 6 became wrong, 23 stayed right, 307 stayed wrong" in " ".join(
        text.split()
    )
    assert all(str(estimate_cell(estimate)) in text for estimate in estimates(0.2).values()), "a fifth method is shown"


def test_markdown_has_one_row_per_metric_and_one_column_per_method() -> None:
    methods = [
        MethodResult(method=Method(student="teacher", ablated="a | b\n<b>"), estimates=estimates(0.1)),
        result("base", car=Estimate(0.5, 0.4, 0.6)),
    ]
    hostile = dataclasses.replace(RUN, methods=methods, goodput={})
    rows = [line for line in render_markdown(hostile).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(METRICS)
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {4}
    assert "<b>" not in rows[0]
    assert [row.endswith("| 0.50 [0.40, 0.60] |") for row in rows[2:]].count(True) == 1


def test_names_in_the_terminal_are_not_markup() -> None:
    assert HOSTILE in render_terminal(RunSummary(title=HOSTILE, methods=[]))


@pytest.mark.parametrize("render", RENDERERS)
def test_an_incomplete_summary_gives_a_report(render: Any) -> None:
    assert "Research use only" in render(RunSummary(title="nothing yet", methods=[]))
    methods = [result("base", car=Estimate(0.5, 0.4, 0.6)), result("aligned", readable=Estimate(1, 1, 1))]
    assert "n/a" in render(RunSummary(title="few", methods=methods))
    undefined = RunSummary(title="few", methods=[result("base", car=Estimate(math.nan, math.nan, math.nan))])
    assert "nan" not in render(undefined).lower()
