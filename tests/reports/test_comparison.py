"""Rows, tables and text forms of the report of a comparison."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from mint_ray.config.loader import dump, from_data
from mint_ray.records import Method
from mint_ray.reports.comparison import (
    ComparisonRow,
    ComparisonSummary,
    NearDuplicate,
    NearDuplicateCheck,
    near_duplicate_table,
    render_markdown,
    render_terminal,
    row_key,
    subgroup_table,
)
from mint_ray.reports.tables import estimate_cell
from tests.reports.summaries import ALIGNED, COMPARISON, SUBGROUPS


@pytest.mark.parametrize("render", [render_terminal, render_markdown])
def test_each_form_contains_every_estimate_test_and_failure(render) -> None:  # type: ignore[no-untyped-def]
    text = " ".join(render(COMPARISON).split())
    for row in COMPARISON.measured:
        assert all(str(estimate_cell(estimate)) in text for estimate in row.estimates.values())
    for word in (
        "Top-3 accuracy",
        "+0.38 [+0.25, +0.51]",
        "< 0.001",
        "0.671",
        "0.999",
        "margin drew no pair",
        "Controls must bring no gain.",
        "1 of 60 test notes have a similarity of at least 0.95 to a training or validation note",
        "Research use only; not a diagnostic device.",
    ):
        assert word in text


def test_markdown_contains_everything_that_a_reviewer_asks_for() -> None:
    text = " ".join(render_markdown(COMPARISON).split())
    for word in (
        "control; 3 seeds", "ceiling", "differs in train.trainer.learning", "Noonan syndrome 5", "2.3", "71,234",
        "4 min 14 s", "Paper's E1", "rare labels (31)", "12 to 17 years (6)", "h7", "label", "0.987",
        "orpo: right", "dpo: wrong",
    ):  # fmt: skip
        assert word in text


def test_lines_of_the_terminal_form_fit_and_markdown_tables_are_complete() -> None:
    assert max(map(len, render_terminal(COMPARISON).splitlines())) <= 100
    blocks = re.findall(r"(?:^\|.*\n)+", render_markdown(COMPARISON) + "\n", flags=re.MULTILINE)
    assert len(blocks) >= 7
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_a_summary_can_be_read_back_from_json() -> None:
    assert from_data(ComparisonSummary, json.loads(json.dumps(dump(COMPARISON)))) == COMPARISON


def test_a_row_is_titled_by_its_name_and_mode_and_has_a_unique_key() -> None:
    ranked = Method(student="aligned", mode="rank")
    row = ComparisonRow(name="orpo", method=ranked, role="control", runs=3, differences=["a.b"])
    assert (row.title, row.key, row.remark) == ("orpo, ranked", "orpo/rank", "(control; differs in a.b; 3 seeds)")
    baseline = ComparisonRow(name=None, method=Method(student="base"), role="baseline", runs=1)
    assert (baseline.title, baseline.key, str(baseline.cell)) == ("base student", "base", "base student (baseline)")
    assert row_key("base", Method(student="aligned")) != baseline.key


def test_a_summary_of_failures_gives_a_report() -> None:
    failed = ComparisonRow(name="orpo", method=ALIGNED, role="method", runs=0, error="no memory")
    for render in (render_terminal, render_markdown):
        text = render(ComparisonSummary(title="t", rows=[failed], metric="top_1_accuracy"))
        assert "no memory" in text
    assert "Research use only" in text


def test_subgroups_can_be_selected() -> None:
    table = subgroup_table(COMPARISON, ["female", "sex unknown"])
    assert table is not None
    assert [column.heading for column in table.columns][1:] == [f"female ({SUBGROUPS['female']})"]
    assert subgroup_table(COMPARISON, ["sex unknown"]) is None


def test_the_first_near_duplicates_are_listed() -> None:
    one = NearDuplicate(record_id="h", seen_id="t", similarity=1, same_label=False, same_group=False)
    check = NearDuplicateCheck(compared=30, threshold=0.9, median=0.5, found=[one] * 25)
    table = near_duplicate_table(dataclasses.replace(COMPARISON, near_duplicates=check))
    assert table is not None
    assert len(table.rows) == 20
    assert table.note == "The first 20 of 25; all of them are in comparison.json."
    assert str(table.rows[0][2]) == "neither label nor group"


def test_without_notes_there_is_nothing_to_compare() -> None:
    check = NearDuplicateCheck(compared=0, threshold=0.9, median=0.0, found=[])
    assert check.sentence == "Near-duplicates: there are no notes to compare."
