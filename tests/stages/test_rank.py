"""Rankings of a student: every label with its probability, for the records that pairs are drawn from."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from mint_ray.artifacts import verify
from mint_ray.config.stages import EvaluateResources
from mint_ray.records import Method, Prediction
from mint_ray.stages.rank import rank_labels
from mint_ray.students.config import Student
from tests.stages.inputs import DISEASES, PATIENTS, answer_one_by_one, make_request, write_records
from tests.tiny import save_tiny_student


@pytest.mark.ray
def test_a_ranking_has_every_label_with_its_probability_most_likely_first(ray_cluster: None, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    request = make_request(
        Student(model_id=str(save_tiny_student(tmp_path / "student"))), "rank", ("train", "validation")
    )
    resources = EvaluateResources(cpus_per_actor=1, batch_size=3)
    ranked = rank_labels(str(tmp_path), resources, request, write_records(tmp_path, PATIENTS, DISEASES))
    records = [record for record in PATIENTS if record.split != "test"]
    rows = ranked.rows(Prediction, "answers")
    assert [row.record_id for row in rows] == [record.record_id for record in records]
    for row, logps in zip(rows, answer_one_by_one(request, records), strict=True):
        assert (row.method, row.reason, row.text) == (Method(student="base", mode="rank"), None, "")
        total = sum(math.exp(logp) for logp in logps)
        expected = {label.label_id: math.exp(logp) / total for label, logp in zip(DISEASES, logps, strict=True)}
        assert dict(zip(row.labels, row.scores, strict=True)) == pytest.approx(expected)
        assert row.scores == sorted(row.scores, reverse=True)
        assert sum(row.scores) == pytest.approx(1)
    assert ranked.manifest.counts == {"answers": len(records)}
    assert verify(ranked.uri) == []
