"""The connection to Ray: warnings about resources that the cluster lacks."""

from __future__ import annotations

import re

import pytest

from mint_ray.runtime.session import warn_about_missing_resources

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def test_missing_resources_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    warn_about_missing_resources({"CPU": 0.5, "GPU": 0})
    assert caplog.text == ""
    warn_about_missing_resources({"CPU": 10_000.5, "GPU": 10_000})
    assert "no work has started" in caplog.text
    assert "of 10000.5 CPUs" in caplog.text
    assert re.search(r"\d+ of 10000 GPUs;", caplog.text)
