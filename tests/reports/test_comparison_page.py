"""The HTML page of a comparison: content, escaping, reproducibility and layout."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from pathlib import Path

import pytest

from mint_ray.config.loader import dump, from_data
from mint_ray.metrics import Estimate
from mint_ray.reports.comparison import (
    ComparisonSummary,
    Confusion,
    Disagreement,
    NearDuplicate,
    NearDuplicateCheck,
)
from mint_ray.reports.comparison_page import render_html
from mint_ray.reports.tables import estimate_cell
from tests.reports.pages import CHROMIUM, HOSTILE, Page, lay_out
from tests.reports.summaries import COMPARISON


@functools.cache
def page_of_comparison() -> str:
    """Render the page once: its thirty plots take a second."""
    return render_html(COMPARISON)


def test_the_page_contains_every_estimate_test_and_failure() -> None:
    text = Page(page_of_comparison()).text
    for row in COMPARISON.measured:
        assert all(str(estimate_cell(estimate)) in text for estimate in row.estimates.values())
    for word in (
        "Top-3 accuracy", "+0.38 [+0.25, +0.51]", "< 0.001", "0.671", "0.999", "margin drew no pair",
        "Controls must bring no gain.", "control; 3 seeds", "ceiling", "differs in train.trainer.learning",
        "Noonan syndrome 5", "71,234", "4 min 14 s", "Paper's E1", "rare labels (31)", "h7", "0.987", "orpo: right",
        "dpo: wrong", "base student: no_list", '"seeds"', "train-0123456789ab",
        "1 of 60 test notes have a similarity of at least 0.95 to a training or validation note",
        "Research use only; not a diagnostic device.",
    ):  # fmt: skip
        assert word in text


def test_equal_summaries_give_equal_bytes() -> None:
    assert page_of_comparison() == render_html(from_data(ComparisonSummary, dump(COMPARISON)))


def test_a_page_of_failures_says_so() -> None:
    page = Page(
        render_html(dataclasses.replace(COMPARISON, rows=COMPARISON.failed, tests=[], confusions=[], disagreements=[]))
    )
    assert "No method was measured." in page.text
    assert "simpo: UserError-like text: margin drew no pair" in page.text


def test_undefined_numbers_are_not_shown() -> None:
    undefined = dataclasses.replace(
        COMPARISON.rows[2], estimates={"car": Estimate(math.nan, math.nan, math.nan)}, log_history=[]
    )
    page = Page(render_html(dataclasses.replace(COMPARISON, rows=[undefined, *COMPARISON.rows[3:]]))).text
    assert not re.search(r"\bnan\b", page.lower())


def test_names_are_escaped() -> None:
    rows = [
        dataclasses.replace(row, name=f"{HOSTILE}{place}")
        for place, row in enumerate(COMPARISON.rows[3:6] + COMPARISON.failed)
    ]
    key = rows[0].key
    hostile = dataclasses.replace(
        COMPARISON, title=HOSTILE, rows=rows, notes=[HOSTILE], spec={HOSTILE: HOSTILE}, manifests={HOSTILE: HOSTILE},
        tests=[],
        disagreements=[
            Disagreement(record_id=HOSTILE, prompt=HOSTILE, truth=HOSTILE, answers={key: HOSTILE}, correct=[])
        ],
        confusions=[Confusion(truth=HOSTILE, predicted=HOSTILE, counts={key: 1})],
    )  # fmt: skip
    page = Page(render_html(hostile))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count("<script>alert(") > 20


def test_the_page_loads_nothing_and_every_plot_has_a_description() -> None:
    text = page_of_comparison()
    page = Page(text)
    assert page.loads_nothing
    assert "http:" not in text
    assert "https:" not in text
    plots = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(plots) >= 2 + 6 * 2
    assert all(attributes.get("role") == "img" and attributes.get("aria-label") for attributes in plots)


def test_the_page_can_be_read_without_colour() -> None:
    grey = re.sub(r"#[0-9a-fA-F]{3,6}\b", "#000000", page_of_comparison())
    forest = re.findall(r"<svg.*?</svg>", grey, flags=re.DOTALL)[0]
    assert len(set(re.findall(r'xlink:href="#(m\w+)"', forest))) >= 4, "the two accuracies have different markers"
    assert "stroke-dasharray" in grey, "the validation line is dashed"
    assert "orpo: right" in Page(grey).text


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed to lay out the page")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_does_not_scroll_sideways(tmp_path: Path, width: int) -> None:
    long = "x" * 200
    found = [NearDuplicate(record_id=long, seen_id=long, similarity=1, same_label=True, same_group=True)]
    wide = dataclasses.replace(
        COMPARISON,
        notes=[long],
        counts={long: 10**12},
        rows=[*COMPARISON.rows, dataclasses.replace(COMPARISON.rows[3], name=long)],
        near_duplicates=NearDuplicateCheck(compared=1, threshold=0.9, median=1, found=found),
    )
    scroll, client, height = lay_out(render_html(wide).replace("<details>", "<details open>"), width, tmp_path)
    assert client > width - 30
    assert height > 2000, "the page was laid out"
    assert scroll <= client
