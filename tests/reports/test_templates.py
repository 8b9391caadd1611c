"""Templates of pages and cards."""

from __future__ import annotations

import jinja2
import pytest

from mint_ray.reports.templates import fence, render_page


def test_a_missing_variable_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError):
        render_page("sweep.html.j2", title="t")


def test_a_fence_is_longer_than_any_in_its_content() -> None:
    assert fence("```\ncode\n```").splitlines()[0] == "````text"
    assert fence({"a": 1}) == '```json\n{\n "a": 1\n}\n```'
