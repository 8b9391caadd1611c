"""Plots of the reports, as SVG elements for inline use in a page."""

from __future__ import annotations

import html
import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mint_ray.metrics import Estimate
from mint_ray.reports.formatting import find_k, metric_title
from mint_ray.reports.summary import LabelHits

WIDTH = 5.0
"""Inches, 360 units: a phone shows the plot at its own size, with readable text."""

BLUE, ORANGE, GREEN, INK = "#0072B2", "#B34700", "#00664B", "#222222"
"""Colours with enough contrast on white that people with colour blindness can distinguish (after Okabe and Ito)."""

ACCURACIES = ("top_1_accuracy", "top_k_accuracy")
AGREEMENTS = ("coverage", "avoidance", "car")
"""Metrics that are plotted together."""

_SERIES: tuple[dict[str, Any], ...] = (
    {"color": BLUE, "marker": "o", "markerfacecolor": BLUE},
    {"color": ORANGE, "marker": "s", "markerfacecolor": "white"},
    {"color": GREEN, "marker": "^", "markerfacecolor": GREEN},
)

_STYLE: dict[Any, Any] = {
    # text stays text: it can be searched and read by a screen reader, in the page's font
    "svg.fonttype": "none",
    "svg.hashsalt": "mint_ray",
    # a dollar sign in a name does not start a formula
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.linewidth": 0.8,
}


def drawn(*figures: tuple[str, str]) -> list[tuple[str, str]]:
    """Return the captions and plots that are not empty."""
    return [(caption, svg) for caption, svg in figures if svg]


def draw_forest(methods: Mapping[str, Mapping[str, Estimate]], metrics: Sequence[str], title: str) -> str:
    """Return up to three metrics of each method as points with intervals; an empty string if no method has one."""
    rows = [name for name, estimates in methods.items() if any(metric in estimates for metric in metrics)]
    shown = [metric for metric in metrics if any(metric in methods[name] for name in rows)]
    if not shown:
        return ""
    k = find_k(methods.values())

    def draw(axes: Axes) -> None:
        for number, (metric, style) in enumerate(zip(shown, _SERIES, strict=False)):
            shift = 0.2 * (number - (len(shown) - 1) / 2)
            known = [(place, methods[name][metric]) for place, name in enumerate(rows) if metric in methods[name]]
            points = [(place, estimate) for place, estimate in known if not math.isnan(estimate.value)]
            axes.errorbar(
                [estimate.value for _, estimate in points],
                [place + shift for place, _ in points],
                xerr=[
                    [estimate.value - estimate.low for _, estimate in points],
                    [estimate.high - estimate.value for _, estimate in points],
                ],
                fmt="none",
                ecolor=style["color"],
                capsize=3,
            )
            axes.plot(
                [estimate.value for _, estimate in points],
                [place + shift for place, _ in points],
                linestyle="none",
                markersize=6,
                label=metric_title(metric, k),
                **style,
            )
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [_wrap(name) for name in rows])
        axes.tick_params(axis="y", length=0)
        _share_axis(axes)
        add_legend(axes)

    return render_figure(draw, height=1.1 + 0.5 * len(rows), title=title)


def draw_history(history: Sequence[Mapping[str, Any]], key: str, title: str) -> str:
    """Return one metric over steps, in training and validation (`eval_` keys); an empty string if it was not logged."""
    series = {"training": _series(history, key), "validation": _series(history, f"eval_{key}")}
    if not any(series.values()):
        return ""

    def draw(axes: Axes) -> None:
        for (name, points), style, line in zip(series.items(), _SERIES, ("-", "--"), strict=False):
            if points:
                steps, numbers = zip(*points, strict=True)
                # markers on all of a thousand points would merge into a thick line
                every = max(1, len(points) // 20)
                axes.plot(steps, numbers, linestyle=line, label=name, markersize=5, markevery=every, **style)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        add_legend(axes)

    return render_figure(draw, height=2.9, title=title)


def draw_labels(labels: Sequence[LabelHits], title: str) -> str:
    """Return the share of right records of each label, before and after alignment, as pairs of bars."""
    labels = [label for label in labels if label.n > 0]
    if not labels:
        return ""

    def draw(axes: Axes) -> None:
        for place, label in enumerate(labels):
            bars: tuple[tuple[str, int, float, dict[str, Any]], ...] = (
                ("base student", label.base, 0.02, {"facecolor": "white", "edgecolor": INK, "hatch": "/////"}),
                ("aligned student", label.aligned, 0.32, {"facecolor": BLUE, "edgecolor": BLUE}),
            )
            for name, hits, shift, style in bars:
                axes.barh(
                    place + shift, hits / label.n, height=0.26, linewidth=0.8, label="" if place else name, **style
                )
                axes.text(hits / label.n + 0.015, place + shift, str(hits), va="center", fontsize=8)
            axes.text(0, place - 0.28, f"{_shorten(label.name)} ({label.n})", va="center", fontsize=9)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_yticks([])
        _share_axis(axes)
        add_legend(axes)

    return render_figure(draw, height=1.0 + 0.5 * len(labels), title=title)


def _series(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    points = [(row.get("step"), row.get(key)) for row in history]
    return [
        (step, number)
        for step, number in points
        if isinstance(step, int | float) and isinstance(number, int | float) and math.isfinite(number)
    ]


def _shorten(name: str, longest: int = 50) -> str:
    # shortened in the middle, because the names of a disease family differ at the end
    name = " ".join(name.split())
    return name if len(name) <= longest else f"{name[: longest - 16].rstrip()} … {name[-13:].lstrip()}"


def _wrap(name: str) -> str:
    return "\n".join(textwrap.wrap(name, 16, max_lines=3, placeholder=" …"))


def _share_axis(axes: Axes) -> None:
    axes.set_xlim(-0.02, 1.08)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.50", "0.75", "1"])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def add_legend(axes: Axes) -> None:
    """Add a legend above the axes."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderaxespad=0.2, fontsize=9)


def render_figure(draw: Callable[[Axes], None], height: float, title: str) -> str:
    """Return the figure as one `<svg>` element, without dates, metadata or ids that two plots would share.

    Args:
        draw: Function that draws on the axes.
        height: Height in inches.
        title: Description for screen readers.
    """
    with matplotlib.rc_context(), warnings.catch_warnings():
        # characters that this font lacks are still text, drawn in the reader's font
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        # independent of the user's matplotlibrc
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        target = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(target, metadata=nothing)  # type: ignore[no-untyped-call]
    svg = target.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' id="[A-Za-z.0-9]+_\d+"', "", svg)
    # inline SVG needs no namespaces; without them the page contains no URL
    inside = svg[svg.index(">") + 1 :].rstrip()
    # matplotlib's SVG has 72 units per inch
    return f'<svg viewBox="0 0 {WIDTH * 72:g} {height * 72:g}" role="img" aria-label="{html.escape(title)}">{inside}'
