from __future__ import annotations

import subprocess
import sys

import pytest

from mint_ray.telemetry import MEASURES, measure, running


def test_numbers_told_outside_ray_are_dropped_and_load_nothing_for_it() -> None:
    code = (
        "import sys; from mint_ray.telemetry import measure, running\n"
        "with running('score'): measure('records_scored', 5, run='score-1')\n"
        "assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_name_or_a_tag_that_is_not_in_the_table_is_refused() -> None:
    with pytest.raises(KeyError, match="records_scored_typo"):
        measure("records_scored_typo", 1, run="score-1")
    with pytest.raises(ValueError, match="records_scored: got the tags stage; it has run"):
        measure("records_scored", 1, stage="score")


def test_what_a_block_raises_is_not_held_up_by_its_signs_of_life() -> None:
    with pytest.raises(RuntimeError, match="inside"), running("score"):
        raise RuntimeError("inside")


def test_prometheus_knows_a_measure_by_its_kind() -> None:
    assert MEASURES["records_scored"].series == ("ray_mint_records_scored_total",)
    assert MEASURES["loss"].series == ("ray_mint_loss",)
    assert MEASURES["step_seconds"].series == tuple(f"ray_mint_step_seconds_{of}" for of in ("bucket", "count", "sum"))


def test_units_stand_in_the_names_and_tags_are_few() -> None:
    for row in MEASURES.values():
        assert row.name.endswith("_seconds") or not row.unit.endswith("seconds"), row
        assert set(row.tags) <= {"stage", "reason", "state", "split", "run"}
        assert bool(row.bounds) == (row.kind == "histogram")
        assert list(row.bounds) == sorted(set(row.bounds))
