"""Metrics of every method on the held-out records, from scores and answers that are written already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mint_ray.artifacts import Artifact, open_artifact, verify
from mint_ray.config.stages import Evaluate
from mint_ray.lineage import EvaluationInputs
from mint_ray.metrics.methods import read_methods
from mint_ray.records import Method, Prediction, Record, TeacherScores
from mint_ray.samplers import Hard
from mint_ray.stages.evaluate import evaluate_student
from mint_ray.tasks.config import RareDisease
from tests.stages.inputs import DISEASES, PATIENTS, write_records

IDS = [label.label_id for label in DISEASES]
HELD_OUT = [record for record in PATIENTS if record.split == "test"]
SAMPLER = Hard(top=3)
BASE, ALIGNED = Method(student="base"), Method(student="aligned")
ALIGNED_RANK, RETRIEVAL = Method(student="aligned", mode="rank"), Method(student="base", retrieval=True)


def rank_true_label(record: Record, rank: int) -> list[str]:
    """Return all labels, the record's own at this rank, starting from 0."""
    others = [label for label in IDS if label != record.label_id]
    return [*others[:rank], str(record.label_id), *others[rank:]]


def write_scores(root: Path) -> Artifact:
    """Write scores that put the true label first; without the face second; one held-out record has failed."""
    artifact = open_artifact(str(root), "score", {}, {})
    failed = HELD_OUT[0].record_id

    def row(record: Record, rank: int) -> TeacherScores:
        is_failed = record.record_id == failed
        return TeacherScores(
            record_id=record.record_id,
            split=record.split,
            teacher="t",
            labels=[] if is_failed else rank_true_label(record, rank),
            scores=[] if is_failed else [1.0 / place for place in range(1, 8)],
            status="failed" if is_failed else "ok",
            reason="no_known_phenotype" if is_failed else None,
        )

    with artifact.write() as draft:
        draft.write_rows(TeacherScores, "scores", [row(record, 0) for record in PATIENTS])
        draft.write_rows(TeacherScores, "without_face", [row(record, 1) for record in HELD_OUT])
    return artifact


def write_answers(root: Path, method: Method, rank: int) -> Artifact:
    """Write answers of three labels, or rankings of all, with the true one at this rank; the last has no list."""
    artifact = open_artifact(str(root), "answer", {"method": method.key}, {})
    rows = [
        Prediction(
            record_id=record.record_id,
            student=method.student,
            retrieval=method.retrieval,
            mode=method.mode,
            labels=rank_true_label(record, rank)[: None if method.mode == "rank" else 3],
            text="",
        )
        for record in HELD_OUT[:-1]
    ]
    last = Prediction(
        record_id=HELD_OUT[-1].record_id, student=method.student, retrieval=method.retrieval, mode=method.mode,
        labels=[], text="I do not know.", reason="no_list",
    )  # fmt: skip
    with artifact.write() as draft:
        draft.write_rows(Prediction, "answers", [*rows, last])
    return artifact


def write_metrics(root: Path, stage: str, metrics: dict[str, Any]) -> Artifact:
    artifact = open_artifact(str(root), stage, {}, {})
    with artifact.write() as draft:
        draft.metrics.update(metrics)
    return artifact


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> EvaluationInputs:
    root = tmp_path_factory.mktemp("root")
    ranks = {BASE: 2, RETRIEVAL: 1, ALIGNED: 0, ALIGNED_RANK: 5}
    return EvaluationInputs(
        records=write_records(root, PATIENTS, DISEASES),
        scores=write_scores(root),
        student=write_metrics(root, "train", {}),
        answers={method: write_answers(root, method, rank) for method, rank in ranks.items()},
        passages={"base": write_metrics(root, "choose_passages", {"shown": {"recall": 0.5, "records": 4}})},
        benchmarks={"base": write_metrics(root, "benchmark", {"arc_easy": {"acc": {"value": 0.25}}})},
    )


@pytest.fixture(scope="module")
def evaluated(inputs: EvaluationInputs) -> Artifact:
    return evaluate_student(inputs.records.root, Evaluate(resamples=50), RareDisease(), SAMPLER, inputs)


def test_methods_are_the_teacher_with_each_ablation_and_then_the_answers_in_their_order(evaluated: Artifact) -> None:
    teachers = [Method(student="teacher"), Method(student="teacher", ablated="face")]
    methods = read_methods(evaluated.manifest.metrics)
    assert list(methods) == [*teachers, BASE, RETRIEVAL, ALIGNED, ALIGNED_RANK]
    correct = (len(HELD_OUT) - 1) / len(HELD_OUT)
    top_1 = {method: estimates["top_1_accuracy"].value for method, estimates in methods.items()}
    expected = {teachers[0]: correct, teachers[1]: 0, BASE: 0, RETRIEVAL: 0, ALIGNED: correct, ALIGNED_RANK: 0}
    assert top_1 == pytest.approx(expected, abs=1e-4)
    top_k = {method: estimates["top_k_accuracy"].value for method, estimates in methods.items()}
    assert top_k == pytest.approx(dict.fromkeys(methods, correct) | {ALIGNED_RANK: 0}, abs=1e-4)


def test_every_method_has_a_prediction_for_every_held_out_record(evaluated: Artifact) -> None:
    rows = evaluated.rows(Prediction, "predictions")
    ids = [record.record_id for record in HELD_OUT]
    for method in read_methods(evaluated.manifest.metrics):
        assert [row.record_id for row in rows if row.method == method] == ids
    teacher = [row for row in rows if row.method == Method(student="teacher")]
    # as many labels as a student lists
    assert [row.labels for row in teacher[1:]] == [rank_true_label(record, 0)[:3] for record in HELD_OUT[1:]]
    assert (teacher[0].labels, teacher[0].reason) == ([], "no_known_phenotype")


def test_answers_without_labels_are_counted_by_method_and_reason(evaluated: Artifact) -> None:
    assert evaluated.manifest.dropped == {
        "aligned student, ranked: no_list": 1,
        "aligned student: no_list": 1,
        "base student with passages: no_list": 1,
        "base student: no_list": 1,
        "teacher without face: no_known_phenotype": 1,
        "teacher: no_known_phenotype": 1,
    }
    assert evaluated.manifest.counts == {"records": len(HELD_OUT), "groups": len(HELD_OUT)}


def test_recall_of_passages_and_benchmarks_are_listed_by_student(evaluated: Artifact) -> None:
    metrics = evaluated.manifest.metrics
    assert metrics["retrieval"] == [{"student": "base", "shown": {"recall": 0.5, "records": 4}}]
    assert metrics["harness"] == [{"student": "base", "tasks": {"arc_easy": {"acc": {"value": 0.25}}}}]
    assert json.loads(Path(evaluated.file_uri("metrics.json")).read_text()) == metrics
    assert verify(evaluated.uri) == []


def test_a_complete_evaluation_is_not_computed_again(
    evaluated: Artifact, inputs: EvaluationInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Artifact, "rows", lambda *_: pytest.fail("rows were read"))
    again = evaluate_student(evaluated.root, Evaluate(resamples=50), RareDisease(), SAMPLER, inputs)
    assert again.manifest == evaluated.manifest
