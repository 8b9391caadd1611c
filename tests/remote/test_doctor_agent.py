"""Checks of one node without a cluster; tests/remote/test_doctor.py runs the script on one."""

from __future__ import annotations

import platform
import time
from pathlib import Path

import pytest

from mint_ray.remote import doctor_agent
from mint_ray.remote.doctor_agent import NodeCheck


def test_versions_are_those_that_the_doctor_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    found = NodeCheck().versions()
    assert found["python"] == platform.python_version()
    assert found["mint-ray"] is not None
    monkeypatch.setattr("importlib.metadata.version", raise_not_found)
    assert NodeCheck().versions() == found | {"mint-ray": None}


def raise_not_found(name: str) -> str:
    import importlib.metadata

    raise importlib.metadata.PackageNotFoundError(name)


def test_a_root_without_the_heads_marker_is_not_shared(tmp_path: Path) -> None:
    marker = doctor_agent._write_marker(str(tmp_path))
    assert marker is not None
    assert NodeCheck().storage(str(tmp_path), marker) is None
    doctor_agent._delete_marker(marker)
    assert list(tmp_path.iterdir()) == []
    problem = NodeCheck().storage(str(tmp_path), marker)
    assert problem is not None
    assert "the nodes do not share this disk" in problem


def test_a_root_that_cannot_be_written_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    problem = NodeCheck().storage(str(tmp_path / "file"), None)
    assert problem is not None
    assert "cannot be written" in problem
    assert "\n" not in problem


@pytest.mark.parametrize("ahead", [0.0, 60.0])
def test_skew_is_within_its_error_of_the_real_difference(monkeypatch: pytest.MonkeyPatch, ahead: float) -> None:
    class Clock:
        @staticmethod
        def remote() -> float:
            return time.time() + ahead

    class Check:
        clock = Clock

    monkeypatch.setattr(doctor_agent.ray, "get", lambda reference, timeout: reference)
    skew, error = doctor_agent._measure_skew(Check)
    assert abs(skew - ahead) <= error + 1e-6 < 1
