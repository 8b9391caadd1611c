"""Reports: one summary of a run, a comparison or a sweep, rendered as plain text, Markdown and one HTML page.

Tested by tests/reports/test_text.py and tests/reports/test_run_page.py.
"""

from __future__ import annotations

from mint_ray.reports.summary import Example, LabelHits, MethodResult, RunSummary

__all__ = ["Example", "LabelHits", "MethodResult", "RunSummary", "render_html", "render_markdown", "render_terminal"]


def render_terminal(summary: RunSummary) -> str:
    """Render a run's summary as plain text, 100 columns wide and without colour codes."""
    from mint_ray.reports.text import render_terminal

    return render_terminal(summary)


def render_markdown(summary: RunSummary) -> str:
    """Render a run's summary as Markdown: the table of metrics, notes and the resource accounting."""
    from mint_ray.reports.text import render_markdown

    return render_markdown(summary)


def render_html(summary: RunSummary) -> str:
    """Render a run's summary as one self-contained page; equal summaries give equal bytes."""
    from mint_ray.reports.run_page import render_html

    return render_html(summary)
