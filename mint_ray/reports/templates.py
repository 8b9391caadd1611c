"""Fill the page templates of the reports."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mint_ray.reports import summary


def render_page(template: str, **values: Any) -> str:
    """One self-contained page: inline style and plots, no script, no address that a browser would ask for anything.

    `values` are what the template names, functions among them; every text in them is escaped. Raises jinja2's
    UndefinedError for a name that is missing.
    """
    environment = Environment(
        loader=PackageLoader("mint_ray.reports", "."),
        # by extension jinja2 would take `.j2` for plain text
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        title_of=summary.title_of,
        show_value=summary.show_value,
        show_interval=summary.show_interval,
        show_seconds=summary.show_seconds,
        research_use=summary.RESEARCH_USE,
    )
    return environment.get_template(template).render(**values)
