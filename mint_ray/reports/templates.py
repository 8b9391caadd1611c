"""Templates of the reports: pages in HTML, cards in Markdown."""

from __future__ import annotations

import json
import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mint_ray.reports.formatting import RESEARCH_USE
from mint_ray.reports.tables import escape


def render_page(template: str, **values: Any) -> str:
    """Render one self-contained page: inline style and plots, no scripts and no links, so it loads nothing.

    `values` are the variables of the template; all text in them is escaped. Raises jinja2's UndefinedError for a
    missing variable.
    """
    # the extension of the templates is .j2, for which jinja2 would not escape by itself
    return _environment(autoescape=True).get_template(template).render(research_use=RESEARCH_USE, **values)


def render_card(template: str, **values: Any) -> str:
    """Render a Markdown card in the Hub's format; templates escape text with the filters `escape` and `fence`."""
    environment = _environment(autoescape=False)
    environment.keep_trailing_newline = True
    environment.filters.update(escape=escape, fence=fence)
    return environment.get_template(template).render(research_use=RESEARCH_USE, **values)


def fence(value: Any) -> str:
    """Return text, or plain data as JSON, in a code block that its content cannot end."""
    language = "text" if isinstance(value, str) else "json"
    text = value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False)
    ticks = "`" * (1 + max([2, *(len(run) for run in re.findall("`+", text))]))
    return f"{ticks}{language}\n{text}\n{ticks}"


def _environment(autoescape: bool) -> Environment:
    return Environment(
        loader=PackageLoader("mint_ray.reports", "."),
        autoescape=autoescape,  # noqa: S701  # off for Markdown cards, whose templates escape by filters
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
