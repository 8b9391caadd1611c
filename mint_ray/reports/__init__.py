"""What people look at after a run: one summary, shown in a terminal, as Markdown or as a page."""

from __future__ import annotations

from mint_ray.reports.summary import Example, LabelHits, RunSummary

__all__ = ["Example", "LabelHits", "RunSummary", "render_html", "render_markdown", "render_terminal"]


def render_terminal(summary: RunSummary) -> str:
    """Plain text, 100 columns wide and without colour codes."""
    from mint_ray.reports.text import render_terminal

    return render_terminal(summary)


def render_markdown(summary: RunSummary) -> str:
    """The table of methods and metrics in Markdown."""
    from mint_ray.reports.text import render_markdown

    return render_markdown(summary)


def render_html(summary: RunSummary) -> str:
    """One self-contained page; the same summary gives the same bytes."""
    from mint_ray.reports.page import render_html

    return render_html(summary)
