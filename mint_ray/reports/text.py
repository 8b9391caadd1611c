"""Write a run's summary as text for a terminal and as Markdown."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from mint_ray.reports.summary import (
    GOODPUT_HEADINGS,
    GOODPUT_MEANING,
    RESEARCH_USE,
    RunSummary,
    goodput_line,
    goodput_rows,
    show,
    show_seconds,
    title_of,
)

WIDTH = 100
_METHODS_ACROSS = 4
"""As many columns as `0.43 [0.31, 0.55]` leaves room for in `WIDTH`."""


def render_terminal(summary: RunSummary) -> str:
    """Tables of metrics by method, then counts, dropped rows, seconds and notes; 100 columns, no colour codes."""
    target = io.StringIO()
    # names come from users: brackets and colons in them are no markup and no emoji
    console = Console(
        file=target, width=WIDTH, force_terminal=False, color_system=None, markup=False, emoji=False, highlight=False
    )
    console.print(summary.title)
    names = list(summary.methods)
    for start in range(0, len(names), _METHODS_ACROSS):
        methods = names[start : start + _METHODS_ACROSS]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column(f"metric [{summary.interval}]")
        for method in methods:
            table.add_column(method, justify="right", min_width=len("0.43 [0.31, 0.55]"), overflow="fold")
        for metric in summary.metrics:
            table.add_row(title_of(metric), *(show(summary.methods[method].get(metric)) for method in methods))
        console.print(table)
    blocks = [
        *((f"{stage}:", counts) for stage, counts in summary.counts.items()),
        *((f"{stage}, dropped:", reasons) for stage, reasons in summary.dropped.items() if reasons),
    ]
    for heading, numbers in blocks:
        console.print(heading, ", ".join(f"{name} {number:,}" for name, number in numbers.items()))
    if summary.moved:
        console.print(
            f"alignment put {summary.moved.gained:,} right and {summary.moved.lost:,} wrong; "
            f"{summary.moved.kept:,} stayed right, {summary.moved.neither:,} stayed wrong"
        )
    if summary.seconds:
        console.print("time:", ", ".join(f"{stage} {show_seconds(took)}" for stage, took in summary.seconds.items()))
    if rented := goodput_line(summary.goodput):
        console.print("rented:", rented)
    for note in summary.notes:
        console.print(f"note: {note}")
    console.print(RESEARCH_USE)
    return "\n".join(line.rstrip() for line in target.getvalue().splitlines()) + "\n"


def render_markdown(summary: RunSummary) -> str:
    """The table of metrics by method, with the notes below it, and what was rented."""
    lines = [f"## {escape(summary.title)}", ""]
    if summary.methods:
        lines += [
            "| " + " | ".join([f"metric [{summary.interval}]", *map(escape, summary.methods)]) + " |",
            "|---|" + "---:|" * len(summary.methods),
        ]
        for metric in summary.metrics:
            cells = [show(estimates.get(metric)) for estimates in summary.methods.values()]
            lines.append("| " + " | ".join([escape(title_of(metric)), *cells]) + " |")
        lines.append("")
    if summary.notes:
        lines += [*(f"- {escape(note)}" for note in summary.notes), ""]
    if rows := goodput_rows(summary.goodput):
        lines += ["### What was rented", "", *table(GOODPUT_HEADINGS, rows), "", GOODPUT_MEANING, ""]
    return "\n".join([*lines, RESEARCH_USE, ""])


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> list[str]:
    """The lines of a Markdown table; the first `words` columns hold anybody's words, all others numbers of ours."""
    return [
        "| " + " | ".join(map(escape, headings)) + " |",
        "|" + "---|" * words + "---:|" * (len(headings) - words),
        *("| " + " | ".join([*map(escape, row[:words]), *row[words:]]) + " |" for row in rows),
    ]


def escape(text: str) -> str:
    """Text that neither ends its cell nor becomes HTML or emphasis."""
    return re.sub(r"([\\`*_|\[\]])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
