"""Report of one run as plain text and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping

from mint_ray.metrics import Estimate
from mint_ray.reports import tables
from mint_ray.reports.formatting import (
    RESEARCH_USE,
    find_k,
    format_level,
    format_seconds,
    metric_title,
    order_metrics,
)
from mint_ray.reports.goodput import goodput_sentence, goodput_table
from mint_ray.reports.summary import RunSummary
from mint_ray.reports.tables import Table, escape, estimate_cell, make_table


def results_table(estimates: Mapping[str, Mapping[str, Estimate]], confidence: float, title: str = "") -> Table | None:
    """Return the table of metrics (rows) by method (columns); None if there is no estimate."""
    metrics, k = order_metrics(estimates.values()), find_k(estimates.values())
    if not metrics:
        return None
    return make_table(
        [f"metric [{format_level(confidence)}]", *estimates],
        [
            [metric_title(metric, k), *(estimate_cell(found.get(metric)) for found in estimates.values())]
            for metric in metrics
        ],
        title=title,
    )


def render_terminal(summary: RunSummary) -> str:
    """Render metrics, counts, dropped rows, times and notes as plain text."""
    results = results_table(summary.estimates, summary.confidence)
    lines: list[str | Table] = [summary.title, *([results] if results else [])]
    groups = [
        *((f"{stage}:", counts) for stage, counts in summary.counts.items()),
        *((f"{stage}, dropped:", reasons) for stage, reasons in summary.dropped.items() if reasons),
    ]
    lines += [f"{heading} {', '.join(f'{name} {n:,}' for name, n in numbers.items())}" for heading, numbers in groups]
    if moved := summary.transitions:
        lines.append(
            f"alignment: {moved.gained:,} records became right, {moved.lost:,} became wrong, {moved.kept:,} stayed "
            f"right, {moved.neither:,} stayed wrong"
        )
    if summary.seconds:
        times = ", ".join(f"{stage} {format_seconds(seconds)}" for stage, seconds in summary.seconds.items())
        lines.append(f"time: {times}")
    if used := goodput_sentence(summary.goodput):
        lines.append(f"allocated: {used}")
    return tables.render_text([*lines, *(f"note: {note}" for note in summary.notes), RESEARCH_USE])


def render_markdown(summary: RunSummary) -> str:
    """Render metrics, notes and the resource accounting as Markdown."""
    results = results_table(summary.estimates, summary.confidence)
    resources = goodput_table(summary.goodput)
    return tables.render_markdown(
        [
            f"## {escape(summary.title)}",
            *([results] if results else []),
            *(["\n".join(f"- {escape(note)}" for note in summary.notes)] if summary.notes else []),
            *([resources] if resources else []),
            RESEARCH_USE,
        ]
    )
