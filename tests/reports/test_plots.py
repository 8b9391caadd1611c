"""Plots as inline SVG."""

from __future__ import annotations

import math
import re

from mint_ray.metrics import Estimate
from mint_ray.reports import render_html
from mint_ray.reports.plots import ACCURACIES, draw_forest, draw_history, draw_labels, drawn
from tests.reports.summaries import RUN


def test_plots_can_be_read_without_colour() -> None:
    page = render_html(RUN)
    grey = re.sub(r"#[0-9a-fA-F]{6}\b", "#000000", page)
    assert "<pattern" in grey, "bars of the base student are hatched"
    assert "stroke-dasharray" in grey, "the validation line is dashed"
    forest = re.findall(r"<svg.*?</svg>", grey, flags=re.DOTALL)[0]
    markers = set(re.findall(r'xlink:href="#(m\w+)"', forest))
    assert len(markers) >= 4, "the two accuracies have different markers, besides ticks and caps"


def test_the_legend_has_the_k_of_top_k_accuracy() -> None:
    estimates = {"orpo": {"top_k_accuracy": Estimate(0.5, 0.4, 0.6, 3)}}
    assert "Top-3 accuracy" in draw_forest(estimates, ACCURACIES, "Accuracy")


def test_nothing_to_plot_gives_no_plot() -> None:
    assert draw_forest({"orpo": {}}, ACCURACIES, "Accuracy") == ""
    assert draw_history([{"step": 1, "loss": math.nan}], "loss", "Loss") == ""
    assert draw_labels([], "Labels") == ""
    assert drawn(("a", ""), ("b", "<svg>")) == [("b", "<svg>")]
