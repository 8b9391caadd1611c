"""Draw a run's plots as SVG text that can stand inside a page."""

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
from mint_ray.reports.summary import LabelHits, title_of

WIDTH = 5.0
"""Inches, that is 360 units: a phone shows the plot at its own size, with letters that can be read."""

BLUE, ORANGE, GREEN, INK = "#0072B2", "#B34700", "#00664B", "#222222"
"""Dark enough on white, and told apart by people who see few colours (after Okabe and Ito)."""

_SERIES: tuple[dict[str, Any], ...] = (
    {"color": BLUE, "marker": "o", "markerfacecolor": BLUE},
    {"color": ORANGE, "marker": "s", "markerfacecolor": "white"},
    {"color": GREEN, "marker": "^", "markerfacecolor": GREEN},
)

_STYLE: dict[Any, Any] = {
    # text stays text: it can be searched and read aloud, and the page's own font draws it
    "svg.fonttype": "none",
    "svg.hashsalt": "mint_ray",
    # a dollar sign in a name starts no formula
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


def draw_forest(methods: Mapping[str, Mapping[str, Estimate]], metrics: Sequence[str], title: str) -> str:
    """Up to three metrics of each method as points with their intervals; empty where no method has one."""
    rows = [name for name, estimates in methods.items() if any(metric in estimates for metric in metrics)]
    shown = [metric for metric in metrics if any(metric in methods[name] for name in rows)]
    if not shown:
        return ""

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
                label=title_of(metric),
                **style,
            )
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [_wrap(name) for name in rows])
        axes.tick_params(axis="y", length=0)
        _share_axis(axes)
        add_legend(axes)

    return render_figure(draw, height=1.1 + 0.5 * len(rows), title=title)


def draw_history(history: Sequence[Mapping[str, Any]], key: str, title: str) -> str:
    """One logged number over steps, in training and in validation (`eval_` rows); empty where it was not logged."""
    series = {"training": _series(history, key), "validation": _series(history, f"eval_{key}")}
    if not any(series.values()):
        return ""

    def draw(axes: Axes) -> None:
        for (name, points), style, line in zip(series.items(), _SERIES, ("-", "--"), strict=False):
            if points:
                steps, numbers = zip(*points, strict=True)
                # a marker on each of a thousand points would be a thick line
                every = max(1, len(points) // 20)
                axes.plot(steps, numbers, linestyle=line, label=name, markersize=5, markevery=every, **style)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        add_legend(axes)

    return render_figure(draw, height=2.9, title=title)


def draw_labels(labels: Sequence[LabelHits], title: str) -> str:
    """For each label, the share of its records answered rightly before and after alignment, as a pair of bars."""
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
    # cut in the middle: names of one family differ in the number at their end
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
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderaxespad=0.2, fontsize=9)


def render_figure(draw: Callable[[Axes], None], height: float, title: str) -> str:
    """The figure as one `<svg>` element without dates, metadata or ids of its own that two plots would share."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        # a name in a script that this font lacks is still text: the reader's own font draws it
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        # the user's matplotlibrc must not change the page
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
    # inline SVG needs no namespaces, and the page then holds no address at all
    inside = svg[svg.index(">") + 1 :].rstrip()
    # 72 units to the inch, as matplotlib counts in SVG
    return f'<svg viewBox="0 0 {WIDTH * 72:g} {height * 72:g}" role="img" aria-label="{html.escape(title)}">{inside}'
