from __future__ import annotations

import subprocess
import sys
import types

import pytest

from mint_ray.telemetry import METRICS, heartbeat, record_failed_rows, record_metric
from mint_ray.telemetry import metrics as module


def test_values_recorded_without_ray_are_dropped_and_import_nothing() -> None:
    code = (
        "import sys; from mint_ray.telemetry import heartbeat, record_metric\n"
        "with heartbeat('score'): record_metric('records_scored', 5, run='score-1')\n"
        "assert not {'ray', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_unknown_metric_or_tag_is_rejected() -> None:
    with pytest.raises(KeyError, match="records_scored_typo"):
        record_metric("records_scored_typo", 1, run="score-1")
    with pytest.raises(ValueError, match="records_scored: got the tags stage; expected run"):
        record_metric("records_scored", 1, stage="score")


def test_failed_rows_are_recorded_per_reason_and_zero_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[tuple[float, dict[str, str]]] = []
    counter = types.SimpleNamespace(inc=lambda value, tags: recorded.append((value, tags)))
    monkeypatch.setattr(module, "_is_connected", lambda: True)
    monkeypatch.setattr(module, "_instrument", lambda name: counter)
    record_failed_rows("score", "score-1", {"no_image": 3, "broken": 0})
    assert recorded == [(3, {"stage": "score", "reason": "no_image", "run": "score-1"})]


def test_an_error_inside_a_heartbeat_propagates() -> None:
    with pytest.raises(RuntimeError, match="inside"), heartbeat("score"):
        raise RuntimeError("inside")


def test_a_heartbeat_ends_with_stage_running_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[tuple[str, float]] = []
    monkeypatch.setattr(module, "_is_connected", lambda: True)
    monkeypatch.setattr(module, "record_metric", lambda name, value, **tags: recorded.append((name, value)))
    with heartbeat("score"):
        pass
    assert recorded[-1] == ("stage_running", 0)


def test_series_names_follow_the_kind_of_the_metric() -> None:
    assert METRICS["records_scored"].series == ("ray_mint_records_scored_total",)
    assert METRICS["loss"].series == ("ray_mint_loss",)
    assert METRICS["step_seconds"].series == tuple(f"ray_mint_step_seconds_{of}" for of in ("bucket", "count", "sum"))


def test_names_end_in_their_unit_and_tags_are_few() -> None:
    for metric in METRICS.values():
        assert metric.name.endswith("_seconds") or not metric.unit.endswith("seconds"), metric
        assert set(metric.tags) <= {"stage", "reason", "state", "split", "run"}
        assert bool(metric.boundaries) == (metric.kind == "histogram")
        assert list(metric.boundaries) == sorted(set(metric.boundaries))
