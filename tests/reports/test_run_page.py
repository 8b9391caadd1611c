"""The HTML page of a run: content, escaping, reproducibility and layout."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mint_ray.config.loader import dump, from_data
from mint_ray.metrics import Estimate
from mint_ray.records import Method
from mint_ray.reports import Example, LabelHits, MethodResult, RunSummary, render_html
from mint_ray.reports.tables import estimate_cell
from tests.reports.pages import CHROMIUM, HOSTILE, Page, lay_out
from tests.reports.summaries import RUN, estimates


def test_the_page_contains_every_estimate_and_the_warning() -> None:
    text = Page(render_html(RUN)).text
    for title, found in RUN.estimates.items():
        assert title in text
        assert all(str(estimate_cell(estimate)) in text for estimate in found.values())
    for word in ("95 % interval", "Top-3 accuracy", "Research use only; not a diagnostic device."):
        assert word in text


def test_the_page_contains_every_count_reason_duration_example_and_uri() -> None:
    text = Page(render_html(RUN)).text
    for figure in ("4,312", "517", "12,936", "no_label 41", "281", "46 % gained", "6", "307", "2 h 01 min", "48 s"):
        assert figure in text
    for word in ("r-77", "A tall boy.", "no idea", "1. Marfan", "s3://bucket/train-0123456789ab", '"beta": 0.1'):
        assert word in text
    for label in ("Marfan syndrome (12)", "Rett syndrome (3)"):
        assert label in text
    assert "total 2 h 02 min" in text, "the durations are added up"


def test_names_are_escaped() -> None:
    hostile = RunSummary(
        title=HOSTILE,
        methods=[
            MethodResult(
                method=Method(student="teacher", ablated=HOSTILE),
                estimates={HOSTILE: Estimate(0.5, 0.4, 0.6), "car": Estimate(0.5, 0.4, 0.6)},
            )
        ],
        counts={HOSTILE: {HOSTILE: 1}},
        dropped={HOSTILE: {HOSTILE: 1}},
        per_label=[LabelHits(name=HOSTILE, n=2, base=1, aligned=1)],
        examples=[Example(record_id=HOSTILE, prompt=HOSTILE, truth=HOSTILE, base=HOSTILE, aligned=HOSTILE)],
        notes=[HOSTILE],
        seconds={HOSTILE: 1.0},
        artifacts={HOSTILE: HOSTILE},
        config={HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE},
    )
    page = Page(render_html(hostile))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count("<script>alert(") > 10
    svg = re.findall(r"<svg.*?</svg>", render_html(hostile), flags=re.DOTALL)
    assert any("$x_1$ [bold] (2)</text>" in plot for plot in svg), "a dollar sign does not start a formula"


def test_the_page_loads_nothing() -> None:
    text = render_html(RUN)
    page = Page(text)
    assert page.loads_nothing
    for _, attributes in page.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                assert value is not None
                assert value.startswith("#"), f"{name}={value}"
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert "@import" not in text
    assert "http:" not in text
    assert "https:" not in text


def test_equal_summaries_give_equal_bytes_also_in_another_process() -> None:
    again = from_data(RunSummary, dump(dataclasses.replace(RUN, log_history=RUN.log_history[:1])))
    page = render_html(again)
    assert page == render_html(again)
    code = "import sys, json; from mint_ray.config.loader import from_data; from mint_ray.reports import *; "
    code += "sys.stdout.buffer.write(render_html(from_data(RunSummary, json.load(sys.stdin))).encode())"
    other = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(dump(again)).encode(),
        capture_output=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env={"PYTHONHASHSEED": "7", "MPLCONFIGDIR": "/nonexistent", "PATH": ""},
    )
    assert other.stdout == page.encode()


def test_a_page_without_log_or_labels_has_no_empty_plots() -> None:
    page = render_html(dataclasses.replace(RUN, log_history=[], per_label=[], transitions=None))
    assert page.count("<svg") == 2
    assert "There is no training log." in page
    assert "Changes by alignment" not in page


def test_the_thirty_most_frequent_labels_are_plotted() -> None:
    labels = [LabelHits(name=f"label-{number:02d}", n=number, base=0, aligned=0) for number in range(1, 41)]
    text = Page(render_html(dataclasses.replace(RUN, per_label=labels))).text
    plotted = {int(number) for number in re.findall(r"label-(\d\d) \(", text)}
    assert plotted == set(range(11, 41))
    assert "The 30 most frequent of 40 labels." in text


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed to lay out the page")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_does_not_scroll_sideways(tmp_path: Path, width: int) -> None:
    long = "x" * 300
    wide = dataclasses.replace(
        RUN,
        notes=[long],
        counts={long: {long: 10**12}},
        artifacts={"train": f"s3://{long}"},
        config={long: long},
        examples=[Example(record_id=long, prompt=long, truth=long, base=long, aligned=long)],
        methods=[
            *RUN.methods,
            MethodResult(
                method=Method(student="aligned", retrieval=True, mode="constrained"), estimates=estimates(0.2)
            ),
        ],
    )
    scroll, client, height = lay_out(render_html(wide).replace("<details>", "<details open>"), width, tmp_path)
    assert client > width - 30
    assert height > 1000, "the page was laid out"
    assert scroll <= client
