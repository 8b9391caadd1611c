"""Several pipelines at a time, in tasks of a real local Ray."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from mint_ray.config.loader import UserError, from_data
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.runtime.parallel import one_line, run_several
from tests.tiny import save_tiny_student


@pytest.fixture
def configs(tmp_path: Path) -> dict[str, PipelineConfig]:
    save_tiny_student(tmp_path / "student")
    spec = {
        "root": str(tmp_path / "out"),
        "task": {"kind": "rare_disease"},
        "prepare": {"source": {"kind": "hpo", "diseases": 4, "patients_per_disease": 10}},
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
@pytest.mark.parametrize("concurrent", [1, 2])
def test_each_ends_with_its_artifacts_or_what_it_raised_and_its_log_reaches_the_driver(
    configs: dict[str, PipelineConfig], concurrent: int, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[str] = []

    def is_wanted(name: str) -> bool:
        asked.append(name)
        return name != "unwanted"

    with caplog.at_level(logging.INFO, logger="mint_ray"):
        found = dict(run_several(configs, "prepare", concurrent, is_wanted=is_wanted))
    assert asked == ["first", "bad", "unwanted", "other"]
    assert sorted(found) == ["bad", "first", "other"]
    error = found.pop("bad")
    assert isinstance(error, Exception)
    assert "missing.jsonl.gz" in one_line(error)
    rows = {name: done["prepare"].manifest.counts["records_train"] for name, done in found.items()}  # type: ignore[index]
    assert rows["first"] < rows["other"]
    told = [message for message in caplog.messages if "records_train" in message]
    assert len(told) == 2
    if concurrent > 1:
        assert sorted(message.split(":")[0] for message in told) == ["first", "other"]


def test_an_error_is_told_in_the_line_that_says_what_was_wrong() -> None:
    wrapped = RuntimeError("a traceback\nTo change retry attempts, configure this and that")
    wrapped.__cause__ = MemoryError("long story\nno room for 3 GB\n")
    assert one_line(wrapped) == "MemoryError: no room for 3 GB"
    assert one_line(UserError("pair.sampler: hard drew no pair")) == "pair.sampler: hard drew no pair"
    assert one_line(ValueError()) == "ValueError: ValueError()"
    failed = UserError("pair.sampler: hard drew no pair")
    failed.__cause__ = RuntimeError("worker 0 died")
    assert one_line(failed) == "pair.sampler: hard drew no pair"
