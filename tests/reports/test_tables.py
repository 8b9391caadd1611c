"""Tables in their three forms."""

from __future__ import annotations

import re

from mint_ray.metrics import Estimate
from mint_ray.reports.tables import Cell, Table, escape, estimate_cell, make_table, render_markdown, render_text
from mint_ray.reports.templates import render_page
from tests.reports.pages import HOSTILE, Page

TABLE = make_table(
    ["method", "Accuracy", "p"],
    [[Cell("orpo", "(3 seeds)"), estimate_cell(Estimate(0.5, 0.4, 0.6)), "0.03"], ["sft", estimate_cell(None), "1.00"]],
    title="Results",
    note="Bootstrap intervals.",
)


def page_of(table: Table) -> str:
    return render_page("run.html.j2", **dict(PAGE, results=table))


PAGE = {
    "title": "t", "run": {"notes": [], "transitions": None, "per_label": [], "examples": [], "artifacts": {},
                          "config": {}, "versions": {}},
    "k": 3, "interval": "", "definitions": {}, "forests": [], "histories": [], "label_plots": [], "labels": [],
    "counts": [], "dropped": [], "times": None, "resources": None, "config": "",
}  # fmt: skip


def test_all_forms_have_equal_cells() -> None:
    cells = ["orpo (3 seeds)", "0.50 [0.40, 0.60]", "0.03", "sft", "n/a", "1.00", "Bootstrap intervals."]
    for text in (render_text([TABLE]), render_markdown([TABLE]), Page(page_of(TABLE)).text):
        assert [cell for cell in cells if cell not in text] == []


def test_markdown_aligns_numbers_right_and_puts_the_title_above() -> None:
    assert render_markdown([TABLE]).splitlines()[:5] == [
        "## Results", "", "| method | Accuracy | p |", "|---|---:|---:|", "| orpo (3 seeds) | 0.50 [0.40, 0.60] | 0.03 |"
    ]  # fmt: skip


def test_a_table_that_is_too_wide_for_a_terminal_is_split_and_repeats_its_text_columns() -> None:
    wide = make_table(
        ["method", *(f"metric {number}" for number in range(9))],
        [["orpo", *(estimate_cell(Estimate(number / 10, 0, 1)) for number in range(9))]],
    )
    text = render_text([wide])
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("orpo") == 3
    assert all(f"metric {number}" in text for number in range(9))


def test_the_page_marks_numbers_and_names_the_column_of_every_cell() -> None:
    page = Page(page_of(TABLE))
    cells = [attributes for tag, attributes in page.tags if tag == "td"]
    assert [cell["data-column"] for cell in cells] == ["Accuracy", "p"] * 2
    assert all(cell["class"] == "number" for cell in cells)


def test_text_cells_are_escaped() -> None:
    hostile = make_table(["name", "n"], [[HOSTILE, "1"]])
    assert "<script>" not in render_markdown([hostile])
    assert "script" not in {tag for tag, _ in Page(page_of(hostile)).tags}
    assert HOSTILE in " ".join(re.sub(r"\s+", " ", render_text([hostile])).split())


def test_escaped_text_stays_in_its_cell() -> None:
    assert escape("a | b\n<b> *c* [d]") == r"a \| b &lt;b&gt; \*c\* \[d\]"
