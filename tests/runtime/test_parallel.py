"""Parallel runs of pipelines, in tasks of a real local Ray."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from mint_ray.config.loader import from_data, one_line
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.runtime.parallel import run_pipelines
from tests.tiny import save_tiny_student


@pytest.fixture
def configs(tmp_path: Path) -> dict[str, PipelineConfig]:
    save_tiny_student(tmp_path / "student")
    spec = {
        "root": str(tmp_path / "out"),
        "task": {"kind": "rare_disease"},
        "prepare": {"source": {"kind": "hpo", "num_diseases": 4, "patients_per_disease": 10}},
        "pair": {"sampler": {"kind": "hard", "top": 2}},
        "train": {"student": {"model_id": str(tmp_path / "student")}},
    }
    missing = {"source": {"kind": "phenopackets", "uri": str(tmp_path / "missing.jsonl.gz")}}
    other = {"source": spec["prepare"]["source"] | {"patients_per_disease": 12}}
    return {
        "first": from_data(PipelineConfig, spec),
        "bad": from_data(PipelineConfig, spec | {"prepare": missing}),
        "unwanted": from_data(PipelineConfig, spec),
        "other": from_data(PipelineConfig, spec | {"prepare": other}),
    }


@pytest.mark.ray
@pytest.mark.parametrize("max_concurrent", [1, 2])
def test_each_run_ends_with_its_outputs_or_its_error_and_its_log_reaches_the_driver(
    configs: dict[str, PipelineConfig], max_concurrent: int, caplog: pytest.LogCaptureFixture
) -> None:
    asked_for: list[str] = []

    def is_wanted(name: str) -> bool:
        asked_for.append(name)
        return name != "unwanted"

    with caplog.at_level(logging.INFO, logger="mint_ray"):
        found = dict(run_pipelines(configs, "prepare", max_concurrent, is_wanted=is_wanted))
    assert asked_for == ["first", "bad", "unwanted", "other"]
    assert sorted(found) == ["bad", "first", "other"]
    error = found.pop("bad")
    assert isinstance(error, Exception)
    assert "missing.jsonl.gz" in one_line(error)
    rows = {name: done["prepare"].manifest.counts["records_train"] for name, done in found.items()}  # type: ignore[index]
    assert rows["first"] < rows["other"]
    logged = [message for message in caplog.messages if "records_train" in message]
    assert len(logged) == 2
    if max_concurrent > 1:
        assert sorted(message.split(":")[0] for message in logged) == ["first", "other"]
