"""Answers of a student: written part by part, each once, equal to those of the student called directly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mint_ray.artifacts import Artifact, read_part, verify
from mint_ray.config.loader import UserError
from mint_ray.config.stages import EvaluateResources
from mint_ray.records import Label, Method, Mode, Prediction
from mint_ray.runtime import student_actors
from mint_ray.stages.answer import answer_records
from mint_ray.students.config import Student
from tests.stages.inputs import (
    DISEASES,
    NUM_LABELS,
    PATIENTS,
    answer_one_by_one,
    disease_task,
    interrupt_before_publishing,
    make_request,
    map_parts_here,
    write_records,
)
from tests.tiny import save_tiny_student

RESOURCES = EvaluateResources(cpus_per_actor=1, batch_size=3)
ROWS_PER_PART, RECORDS_PER_PART = 9, 4
HELD_OUT = [record for record in PATIENTS if record.split == "test"]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    torch.set_num_threads(1)
    return Student(model_id=str(save_tiny_student(tmp_path_factory.mktemp("student"))))


def answer(root: Path, student: Student, mode: Mode, resources: EvaluateResources = RESOURCES) -> Artifact:
    records = write_records(root, PATIENTS, DISEASES, rows_per_part=ROWS_PER_PART)
    return answer_records(str(root), resources, make_request(student, mode), records)


@pytest.fixture(scope="module")
def answered(student: Student, tmp_path_factory: pytest.TempPathFactory) -> dict[Mode, Artifact]:
    """Return answers that were written without Ray, in small parts."""
    root = tmp_path_factory.mktemp("answers")
    modes: list[Mode] = ["free", "constrained"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(student_actors, "RECORDS_PER_PART", RECORDS_PER_PART)
        patch.setattr(student_actors, "map_parts", map_parts_here)
        return {mode: answer(root, student, mode) for mode in modes}


@pytest.mark.parametrize("mode", ["free", "constrained"])
def test_written_answers_are_those_of_the_student_called_directly(
    answered: dict[Mode, Artifact], student: Student, mode: Mode
) -> None:
    rows = answered[mode].rows(Prediction, "answers")
    assert [row.record_id for row in rows] == [record.record_id for record in HELD_OUT]
    assert [row.text for row in rows] == answer_one_by_one(make_request(student, mode), HELD_OUT)
    assert [row.labels for row in rows] == [disease_task().parse(row.text).labels for row in rows]
    assert {row.method for row in rows} == {Method(student="base", mode=mode)}
    assert not any(row.scores for row in rows)


def test_every_constrained_answer_lists_different_labels_of_the_task(answered: dict[Mode, Artifact]) -> None:
    for row in answered["constrained"].rows(Prediction, "answers"):
        assert row.reason is None
        assert len(set(row.labels)) == NUM_LABELS
        assert set(row.labels) <= {label.label_id for label in DISEASES}


def test_each_part_has_the_answers_of_a_fixed_number_of_records(answered: dict[Mode, Artifact]) -> None:
    artifact = answered["free"]
    ids = [read_part(artifact.file_uri(file.path))["record_id"].to_pylist() for file in artifact.table_files("answers")]
    parts = [PATIENTS[start : start + ROWS_PER_PART] for start in range(0, len(PATIENTS), ROWS_PER_PART)]
    ranges = [
        part[start : start + RECORDS_PER_PART] for part in parts for start in range(0, len(part), RECORDS_PER_PART)
    ]
    assert ids == [[record.record_id for record in rows if record.split == "test"] for rows in ranges]
    assert artifact.manifest.counts == {"answers": len(HELD_OUT)}
    assert all(verify(each.uri) == [] for each in answered.values())


def test_answers_that_cannot_be_parsed_are_counted(answered: dict[Mode, Artifact]) -> None:
    unparsed = [row for row in answered["free"].rows(Prediction, "answers") if row.reason]
    assert unparsed
    assert sum(answered["free"].manifest.dropped.values()) == len(unparsed)
    assert answered["constrained"].manifest.dropped == {}


class Raises:
    """An actor that must not be created."""

    def __init__(self, *_: Any) -> None:
        raise UserError("the student was loaded again")


@pytest.mark.ray
def test_answers_from_before_an_interruption_are_not_generated_again(
    ray_cluster: None,
    answered: dict[Mode, Artifact],
    student: Student,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with interrupt_before_publishing("answer"):
        answer(tmp_path, student, "free")
    monkeypatch.setattr(student_actors, "StudentActor", Raises)
    # other resources give the same parts
    again = answer(tmp_path, student, "free", EvaluateResources(cpus_per_actor=1, batch_size=1))
    assert again.rows(Prediction, "answers") == answered["free"].rows(Prediction, "answers")
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_label_that_no_answer_can_name_is_an_error_before_any_work(
    student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(student_actors, "map_parts", lambda *_, **__: pytest.fail("work was started"))
    labels = [*DISEASES[:3], Label(label_id="OMIM:9", name="Disease\nof two lines"), *DISEASES[3:]]
    records = write_records(tmp_path, PATIENTS, labels)
    with pytest.raises(UserError, match=r"constrained: label 'OMIM:9' \('Disease\\nof two lines'\) cannot be parsed"):
        answer_records(str(tmp_path), RESOURCES, make_request(student, "constrained"), records)
