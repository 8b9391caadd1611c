"""Text templates over a record, for teachers that read text."""

from __future__ import annotations

from mint_ray.records import Record
from mint_ray.teachers.config import PLACEHOLDER


def render_template(template: str, record: Record) -> str:
    """Return the template with its placeholders replaced by the record's values, which may be empty."""
    values = _template_values(record)
    return PLACEHOLDER.sub(lambda match: values.get(match[1], ""), template)


def render_nonempty(template: str, record: Record) -> str | None:
    """Return the rendered template; None if the record has no value for any of its placeholders."""
    values = _template_values(record)
    if not any(values.get(name) for name in PLACEHOLDER.findall(template)):
        return None
    return render_template(template, record)


def _template_values(record: Record) -> dict[str, str]:
    return {
        "text": record.text or "",
        "phenotypes": ", ".join(item.label or item.id for item in record.phenotypes if not item.excluded),
        "excluded_phenotypes": ", ".join(item.label or item.id for item in record.phenotypes if item.excluded),
        **{f"fields.{name}": value for name, value in record.fields.items()},
    }
