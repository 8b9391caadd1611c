"""What the report of a comparison shows, at the width of a phone and of a desk, with and without colour."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from pathlib import Path

import pytest

from mint_ray.config.loader import dump, from_data
from mint_ray.metrics import METRICS, PAPER_METRICS, Difference, Estimate
from mint_ray.reports.comparison import (
    ComparisonSummary,
    Confusion,
    Cost,
    Disagreement,
    LeakCheck,
    MethodSummary,
    NearDuplicate,
    PairedTest,
    Role,
    render_markdown,
    render_terminal,
    show_difference,
    show_p,
)
from mint_ray.reports.comparison_page import render_html
from mint_ray.reports.summary import show
from tests.reports.test_run_report import CHROMIUM, HOSTILE, Page, lay_out

PARTS = {"rare labels": 31, "frequent labels": 29, "female": 33, "male": 27, "under 1 year": 9, "1 to 5 years": 14,
         "6 to 11 years": 12, "12 to 17 years": 6, "18 to 39 years": 11, "40 years and over": 4, "age unknown": 4}  # fmt: skip
STUDENTS = (
    "base student",
    "orpo",
    "sft",
    "sft on the truth",
    "dpo",
    "simpo",
    "orpo, preferences swapped",
    "orpo, labels renamed",
)


def method(name: str, role: Role, start: float, runs: int = 3) -> MethodSummary:
    values = [start + 0.013 * place for place in range(len(METRICS))]
    trained = role in ("method", "control")
    return MethodSummary(
        name=name,
        role=role,
        runs=runs if trained else 1,
        estimates={key: Estimate(value, value - 0.031, value + 0.043) for key, value in zip(METRICS, values, strict=True)},
        paper={} if role == "ceiling" else {key: start + 0.011 * place for place, key in enumerate(PAPER_METRICS)},
        strata={part: Estimate(start, start - 0.2, start + 0.21) for part in PARTS},
        unread={"no_list": 2} if name == "base student" else {},
        cost=Cost(pairs=243, tokens=71_234, steps=61, seconds={"pair": 2.1, "tokenize": 4.0, "train": 254.0}) if trained else None,
        log_history=[
            {"step": step, "loss": 2.5 / (1 + step / 9), "rewards/accuracies": 0.5 + step / 200} for step in range(5, 61, 5)
        ] + [{"step": 30, "eval_loss": 0.9}, {"step": 60, "eval_loss": 0.6}] if trained else [],
    )  # fmt: skip


SUMMARY = ComparisonSummary(
    title="Aligned by ORPO, or otherwise",
    methods=[
        method("teacher", "ceiling", 0.8),
        method("teacher without face", "ceiling", 0.7),
        method("base student", "baseline", 0.05),
        method("orpo", "method", 0.43),
        method("sft", "method", 0.41),
        method("sft on the truth", "method", 0.3),
        dataclasses.replace(method("dpo", "method", 0.12), unequal=["train.trainer.learning_rate"]),
        method("orpo, preferences swapped", "control", 0.2),
        method("orpo, labels renamed", "control", 0.04),
        MethodSummary(name="simpo", role="method", runs=0, error="UserError-like text: margin drew no pair"),
    ],
    metric="top_1_accuracy",
    tests=[
        PairedTest(first="orpo", second="base student", difference=Difference(0.38, 0.25, 0.51, 0.0001), adjusted=0.0006),
        PairedTest(first="orpo", second="sft", difference=Difference(0.02, -0.07, 0.11, 0.671), adjusted=0.999),
    ],
    parts=PARTS,
    confusions=[
        Confusion(truth="Noonan syndrome 1", named="Noonan syndrome 5", counts=dict.fromkeys(STUDENTS, 2.3)),
    ],
    disagreements=[
        Disagreement(
            record_id="PMID_123_case_7",
            prompt="A 3-year-old boy has short stature.",
            truth="Noonan syndrome 1",
            answers=dict.fromkeys(STUDENTS, "POTENTIAL_DISEASES:\n1. 'Marfan syndrome'"),
            right=["orpo", "sft"],
        )
    ],
    leaks=LeakCheck(
        compared=60, threshold=0.95, median=0.41,
        found=[NearDuplicate(record_id="h7", seen_id="t9", similarity=0.987, same_label=True, same_group=False)],
    ),
    counts={"records_train": 243, "records_test": 60},
    dropped={"no_label": 41},
    notes=["Controls must bring no gain."],
    spec={"seeds": [0, 1, 2]},
    manifests={"train-0123456789ab": {"versions": {"torch": "2.13.0"}}},
)  # fmt: skip


@functools.cache
def page_of_summary() -> str:
    """Drawn once: thirty plots take a second."""
    return render_html(SUMMARY)


@pytest.mark.parametrize("render", [render_terminal, render_markdown, render_html])
def test_each_form_holds_every_estimate_test_and_failure(render) -> None:  # type: ignore[no-untyped-def]
    text = page_of_summary() if render is render_html else render(SUMMARY)
    text = " ".join((Page(text).text if render is render_html else text).split())
    for row in SUMMARY.measured:
        for estimate in row.estimates.values():
            assert show(estimate) in text
    for said in (
        "+0.38 [+0.25, +0.51]",
        "< 0.001",
        "0.671",
        "0.999",
        "margin drew no pair",
        "Controls must bring no gain.",
    ):
        assert said in text
    assert "1 of 60 held-out notes are at least 0.95 like a note of the training or validation split" in text
    assert "Research use only; not a diagnostic device." in text


def test_page_and_its_twin_hold_what_a_reviewer_asks_for() -> None:
    page, twin = Page(page_of_summary()).text, " ".join(render_markdown(SUMMARY).split())
    for said in (
        "control; 3 seeds", "ceiling", "unequal: train.trainer.learning", "Noonan syndrome 5", "2.3", "71,234", "4 min 14 s",
        "h7", "t9", "0.987", "Paper's E1", "rare labels (31)", "Marfan syndrome",
    ):  # fmt: skip
        assert said in page
        assert said.replace("_", "\\_") in twin
    for said in (
        "base student: no_list 2",
        '"seeds"',
        "train-0123456789ab",
        "A 3-year-old boy has short stature.",
        "orpo: right",
        "dpo: wrong",
    ):
        assert said in page


def test_text_forms_have_no_line_over_100_columns_and_markdown_tables_are_whole() -> None:
    assert max(map(len, render_terminal(SUMMARY).splitlines())) <= 100
    blocks = re.findall(r"(?:^\|.*\n)+", render_markdown(SUMMARY) + "\n", flags=re.MULTILINE)
    assert len(blocks) >= 7
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in block.splitlines()}) == 1


def test_a_summary_survives_json() -> None:
    assert from_data(ComparisonSummary, json.loads(json.dumps(dump(SUMMARY)))) == SUMMARY


def test_the_same_summary_gives_the_same_bytes() -> None:
    assert page_of_summary() == render_html(from_data(ComparisonSummary, dump(SUMMARY)))


def test_nothing_but_failures_is_still_a_report() -> None:
    failed = MethodSummary(name="orpo", role="method", runs=0, error="no memory")
    for render in (render_terminal, render_markdown, render_html):
        text = render(ComparisonSummary(title="t", methods=[failed], metric="top_1_accuracy"))
        assert "no memory" in text
        assert "Research use only" in text


def test_numbers_that_are_none_are_not_shown_as_numbers() -> None:
    lost = dataclasses.replace(
        SUMMARY.methods[2], estimates={"car": Estimate(math.nan, math.nan, math.nan)}, log_history=[]
    )
    page = Page(render_html(dataclasses.replace(SUMMARY, methods=[lost, SUMMARY.methods[3]]))).text
    assert "nan" not in re.sub("noonan", "", page.lower())


def test_names_are_text_and_never_markup() -> None:
    some = SUMMARY.methods[2:5] + SUMMARY.failed
    rows = [dataclasses.replace(row, name=f"{HOSTILE}{place}") for place, row in enumerate(some)]
    hostile = dataclasses.replace(
        SUMMARY, title=HOSTILE, methods=rows, notes=[HOSTILE], spec={HOSTILE: HOSTILE}, manifests={HOSTILE: HOSTILE},
        disagreements=[Disagreement(record_id=HOSTILE, prompt=HOSTILE, truth=HOSTILE, answers={HOSTILE: HOSTILE}, right=[])],
        confusions=[Confusion(truth=HOSTILE, named=HOSTILE, counts={HOSTILE: 1})],
    )  # fmt: skip
    page = Page(render_html(hostile))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count("<script>alert(") > 20


def test_the_page_asks_no_one_for_anything_and_every_picture_has_words() -> None:
    text = page_of_summary()
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    assert "http:" not in text
    assert "https:" not in text
    pictures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(pictures) >= 2 + 6 * 2
    assert all(attributes.get("role") == "img" and attributes.get("aria-label") for attributes in pictures)


def test_what_colour_says_is_said_in_words_or_marks_too() -> None:
    grey = re.sub(r"#[0-9a-fA-F]{3,6}\b", "#000000", page_of_summary())
    forest = re.findall(r"<svg.*?</svg>", grey, flags=re.DOTALL)[0]
    assert len(set(re.findall(r'xlink:href="#(m\w+)"', forest))) >= 4, "the two accuracies have markers of their own"
    assert "stroke-dasharray" in grey, "the validation line is dashed"
    assert "orpo: right" in Page(grey).text


def test_small_p_and_differences_are_written_with_their_sign() -> None:
    assert [show_p(p) for p in (0.0004, 0.034, 1.0)] == ["< 0.001", "0.034", "1.000"]
    assert show_difference(Difference(-0.1, -0.2, 0.04, 0.5)) == "-0.10 [-0.20, +0.04]"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed to lay the page out")
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_hangs_over_the_edge_of_the_screen(tmp_path: Path, width: int) -> None:
    long = "x" * 200
    wide = dataclasses.replace(
        SUMMARY,
        notes=[long],
        counts={long: 10**12},
        methods=[*SUMMARY.methods, dataclasses.replace(SUMMARY.methods[3], name=long)],
        leaks=LeakCheck(
            compared=1, threshold=0.9, median=1,
            found=[NearDuplicate(record_id=long, seen_id=long, similarity=1, same_label=True, same_group=True)],
        ),
    )  # fmt: skip
    scroll, client, high = lay_out(render_html(wide).replace("<details>", "<details open>"), width, tmp_path)
    assert client > width - 30
    assert high > 2000, "the page was laid out"
    assert scroll <= client
