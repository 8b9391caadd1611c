"""What the reports of one run show, and what they must never do."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mint_ray.config.loader import dump, from_data
from mint_ray.metrics import METRICS, Estimate, Moved
from mint_ray.reports import Example, LabelHits, RunSummary, render_html, render_markdown, render_terminal
from mint_ray.reports.summary import show, show_seconds
from mint_ray.runtime.goodput import Amount, Goodput

HOSTILE = '<script>alert("1")</script> --> & $x_1$ [bold]'
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def estimates(start: float) -> dict[str, Estimate]:
    """Numbers that differ from metric to metric and from method to method."""
    values = [start + 0.07 * place for place in range(len(METRICS))]
    return {name: Estimate(value, value - 0.031, value + 0.043) for name, value in zip(METRICS, values, strict=True)}


SUMMARY = RunSummary(
    title="Rare disease from text",
    methods={
        "teacher": estimates(0.51),
        "teacher without face": estimates(0.42),
        "base student": estimates(0.05),
        "aligned student": estimates(0.33),
    },
    counts={"prepare": {"train": 4312, "validation": 517}, "pair": {"train": 12936}},
    dropped={"prepare": {"no_label": 41}, "pair": {}},
    log_history=[
        {"step": 10, "loss": 2.5, "log_odds_ratio": -0.9, "learning_rate": 5e-5, "epoch": 0.5},
        {"step": 20, "loss": math.nan, "log_odds_ratio": -0.5, "rewards/accuracies": 0.8},
        {"step": 20, "eval_loss": 1.9, "eval_log_odds_ratio": -0.6},
        {"step": 20, "train_runtime": 12.0},
    ],
    per_label=[
        LabelHits(name="Marfan syndrome", n=12, base=1, aligned=9),
        LabelHits(name="Rett syndrome", n=3, base=0, aligned=2),
    ],
    moved=Moved(kept=23, gained=281, lost=6, neither=307),
    examples=[
        Example(record_id="r-77", prompt="A tall boy.", truth="Marfan syndrome", base="no idea", aligned="1. Marfan")
    ],
    notes=["Facial terms stand in for the photograph."],
    seconds={"train": 7312.0, "score": 48.1},
    goodput={
        "prepare": Goodput(attempts=1, wall_seconds=3.0),
        "score": Goodput(
            attempts=1,
            wall_seconds=48.1,
            waited_seconds=4.0,
            rented=Amount(cpu_seconds=1600.0),
            startup=Amount(cpu_seconds=400.0),
            work=Amount(cpu_seconds=800.0),
            redone=Amount(cpu_seconds=100.0),
            idle=Amount(cpu_seconds=300.0),
        ),
        "train": Goodput(
            attempts=2,
            wall_seconds=7312.0,
            waited_seconds=61.0,
            rented=Amount(cpu_seconds=8400.0, gpu_seconds=1400.0),
            startup=Amount(cpu_seconds=600.0, gpu_seconds=100.0),
            work=Amount(cpu_seconds=7200.0, gpu_seconds=1200.0),
            redone=Amount(cpu_seconds=600.0, gpu_seconds=100.0),
        ),
    },
    artifacts={"train": "s3://bucket/train-0123456789ab"},
    config={"train": {"trainer": {"beta": 0.1}}},
    versions={"mint_ray": "0.1.0"},
)

RENDERERS = (render_terminal, render_markdown, render_html)


class Page(HTMLParser):
    """The tags, the attributes and the visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.mark.parametrize("render", RENDERERS)
def test_each_report_holds_every_estimate_note_and_the_warning(render: Any) -> None:
    text = render(SUMMARY)
    text = Page(text).text if render is render_html else text
    for method, found in SUMMARY.methods.items():
        assert all(word in text for word in method.split())
        for estimate in found.values():
            assert show(estimate) in text
    assert "Facial terms stand in for the photograph." in text
    assert "95 %" in text
    assert "Research use only; not a diagnostic device." in text


def test_the_page_holds_every_count_reason_duration_example_and_address() -> None:
    text = Page(render_html(SUMMARY)).text
    for figure in ("4,312", "517", "12,936", "no_label 41", "281", "46 % gained", "6", "307", "2 h 01 min", "48 s"):
        assert figure in text
    for word in ("r-77", "A tall boy.", "no idea", "1. Marfan", "s3://bucket/train-0123456789ab", '"beta": 0.1'):
        assert word in text
    for label in ("Marfan syndrome (12)", "Rett syndrome (3)"):
        assert label in text
    assert "2 h 02 min" in text, "the durations are added up"


def test_the_terminal_shows_counts_and_dropped_rows_in_100_columns_without_colour(monkeypatch: Any) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    methods = {**SUMMARY.methods, "a student that was given supervised fine-tuning": estimates(0.2)}
    text = render_terminal(dataclasses.replace(SUMMARY, methods=methods))
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text
    for line in ("prepare: train 4,312, validation 517", "prepare, dropped: no_label 41"):
        assert line in text
    assert all(show(estimate) in text for estimate in estimates(0.2).values()), "a fifth method has its own table"


def test_markdown_has_one_row_per_metric_and_one_column_per_method() -> None:
    hostile = dataclasses.replace(
        SUMMARY, methods={"a | b\n<b>": estimates(0.1), "c": {"car": Estimate(0.5, 0.4, 0.6)}}, goodput={}
    )
    rows = [line for line in render_markdown(hostile).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(METRICS)
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {4}
    assert "<b>" not in rows[0]
    assert [row.endswith("| 0.50 [0.40, 0.60] |") for row in rows[2:]].count(True) == 1


def test_names_are_text_and_never_markup() -> None:
    hostile = RunSummary(
        title=HOSTILE,
        methods={HOSTILE: {HOSTILE: Estimate(0.5, 0.4, 0.6), "car": Estimate(0.5, 0.4, 0.6)}},
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
    assert any("$x_1$ [bold] (2)</text>" in plot for plot in svg), "a dollar sign starts no formula"
    assert HOSTILE in render_terminal(hostile)


def test_the_page_asks_no_one_for_anything() -> None:
    text = render_html(SUMMARY)
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                assert value is not None
                assert value.startswith("#"), f"{name}={value}"
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert "@import" not in text
    assert "http:" not in text
    assert "https:" not in text


def test_the_same_summary_gives_the_same_bytes_in_another_process_too() -> None:
    again = from_data(RunSummary, dump(dataclasses.replace(SUMMARY, log_history=SUMMARY.log_history[:1])))
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


def test_a_summary_survives_json() -> None:
    without_nan = dataclasses.replace(SUMMARY, log_history=SUMMARY.log_history[:1])
    assert from_data(RunSummary, dump(without_nan)) == without_nan


@pytest.mark.parametrize("render", RENDERERS)
def test_missing_pieces_leave_a_report_that_says_so(render: Any) -> None:
    assert "Research use only" in render(RunSummary(title="nothing yet", methods={}))
    few = RunSummary(title="few", methods={"a": {"car": Estimate(0.5, 0.4, 0.6)}, "b": {"readable": Estimate(1, 1, 1)}})
    assert "n/a" in render(few)
    undefined = RunSummary(title="few", methods={"a": {"car": Estimate(math.nan, math.nan, math.nan)}})
    assert "nan" not in re.sub("(?i)meaning|nanosecond", "", render(undefined)).lower()


def test_a_page_without_log_or_labels_draws_no_empty_plots() -> None:
    page = render_html(dataclasses.replace(SUMMARY, log_history=[], per_label=[], moved=None))
    assert page.count("<svg") == 2
    assert "No training log was kept." in page
    assert "Where the student was moved" not in page


def test_at_most_thirty_labels_are_drawn_the_most_frequent_ones() -> None:
    labels = [LabelHits(name=f"label-{number:02d}", n=number, base=0, aligned=0) for number in range(1, 41)]
    text = Page(render_html(dataclasses.replace(SUMMARY, per_label=labels))).text
    drawn = {int(number) for number in re.findall(r"label-(\d\d) \(", text)}
    assert drawn == set(range(11, 41))
    assert "The 30 most frequent of 40 labels." in text


def test_plots_differ_by_more_than_colour() -> None:
    page = render_html(SUMMARY)
    grey = re.sub(r"#[0-9a-fA-F]{6}\b", "#000000", page)
    assert "<pattern" in grey, "base bars are hatched"
    assert "stroke-dasharray" in grey, "the validation line is dashed"
    forest = re.findall(r"<svg.*?</svg>", grey, flags=re.DOTALL)[0]
    marks = set(re.findall(r'xlink:href="#(m\w+)"', forest))
    assert len(marks) >= 4, "the two accuracies have markers of their own beside the ticks and caps"


def test_durations_are_written_in_two_units() -> None:
    assert [show_seconds(taken) for taken in (0.44, 59.6, 192, 3720, 360000)] == [
        "0.4 s",
        "1 min 00 s",
        "3 min 12 s",
        "1 h 02 min",
        "100 h 00 min",
    ]


def test_importing_reports_loads_no_plotting_and_no_templates() -> None:
    code = "import sys, mint_ray.reports; print({'matplotlib', 'jinja2', 'rich'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed to lay the page out")
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_hangs_over_the_edge_of_the_screen(tmp_path: Path, width: int) -> None:
    long = "x" * 300
    wide = dataclasses.replace(
        SUMMARY,
        notes=[long],
        counts={long: {long: 10**12}},
        artifacts={"train": f"s3://{long}"},
        config={long: long},
        examples=[Example(record_id=long, prompt=long, truth=long, base=long, aligned=long)],
        methods={**SUMMARY.methods, "a method with a name of many words in it": estimates(0.2)},
    )
    scroll, client, high = lay_out(render_html(wide).replace("<details>", "<details open>"), width, tmp_path)
    assert client > width - 30
    assert high > 1000, "the page was laid out"
    assert scroll <= client


def lay_out(page: str, width: int, folder: Path) -> tuple[int, int, int]:
    """How far the page would scroll sideways, how wide and how high it is, in a browser of that width."""
    inside = html.escape(page)
    outside = folder / "outside.html"
    # a frame has the width that it is given; a browser's window has one below which it will not go
    outside.write_text(
        f'<iframe id="f" style="border:0;width:{width}px;height:900px" srcdoc="{inside}"></iframe><p id="out"></p>'
        "<script>onload = () => { const page = document.getElementById('f').contentDocument.documentElement;"
        "document.getElementById('out').textContent ="
        " `scroll ${page.scrollWidth} client ${page.clientWidth} high ${page.scrollHeight}`; }</script>",
        encoding="utf-8",
    )
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=15000", "--window-size=1400,1000"]
    done = subprocess.run(
        [*command, "--dump-dom", outside.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    found = re.search(r"scroll (\d+) client (\d+) high (\d+)", done.stdout)
    assert found is not None, done.stdout[-500:]
    scroll, client, high = map(int, found.groups())
    return scroll, client, high


def test_reports_say_what_was_rented_and_what_came_of_it() -> None:
    terminal = " ".join(render_terminal(SUMMARY).split())
    # 10,000 processor seconds, 8,000 of them work; 1,400 of GPUs
    assert "rented: 10,000 processor seconds, 80% work, 10% start-up, 7% redone, 3% idle;" in terminal
    assert "1,400 GPU seconds, 86% work, 7% start-up, 7% redone, 0% idle; 1 min 05 s waited for resources" in terminal
    rows = [
        ["score", "1", "48 s", "4.0 s", "1,600", "400", "800", "100", "300"],
        ["train", "2", "2 h 01 min", "1 min 01 s", "8,400", "600", "7,200", "600", "0"],
        ["train, GPUs", "", "", "", "1,400", "100", "1,200", "100", "0"],
        ["together", "3", "2 h 02 min", "1 min 05 s", "10,000", "1,000", "8,000", "700", "300"],
        ["together, GPUs", "", "", "", "1,400", "100", "1,200", "100", "0"],
    ]
    markdown, page = render_markdown(SUMMARY), Page(render_html(SUMMARY)).text
    for row in rows:
        assert "| " + " | ".join(row) + " |" in markdown
        assert " ".join(filter(None, row)) in page
    nothing = dataclasses.replace(SUMMARY, goodput={"prepare": Goodput(attempts=1, wall_seconds=3.0)})
    assert "rented" not in render_terminal(nothing) + render_markdown(nothing) + Page(render_html(nothing)).text
