"""A student's answers: part by part, once, the same as when it is asked directly."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mint_ray.artifacts import Artifact, open_artifact, read_part, verify
from mint_ray.config.loader import UserError, replace
from mint_ray.config.stages import Evaluate, EvaluateResources
from mint_ray.records import Label, Phenotype, Prediction, Record, Split
from mint_ray.stages import evaluate as module
from mint_ray.stages.evaluate import answer_records
from mint_ray.students import Answers, Generation, Student, StudentGenerator
from mint_ray.students.config import Mode
from mint_ray.tasks import Task, build_task
from mint_ray.tasks.config import RareDisease
from tests.tiny import save_tiny_student

pytestmark = pytest.mark.ray

LENGTH = 2
LABELS = [Label(label_id=f"OMIM:{number}", name=f"Disease {number}") for number in range(1, 8)]
SPLITS: list[Split] = ["train", "train", "validation", "test"]
TERMS = ["Seizure", "Short stature", "Ataxia", "Hearing impairment", "Cataract"]
RECORDS = [
    Record(
        record_id=f"r{number:02d}", group_id=f"g{number}", label_id=LABELS[number % 7].label_id,
        split=SPLITS[number % 4], fields={"age": f"P{number}Y"},
        phenotypes=[Phenotype(id=f"HP:000000{place}", label=term) for place, term in enumerate(TERMS[: 1 + number % 5])],
    )
    for number in range(23)
]  # fmt: skip
CONFIG = Evaluate(generation=Generation(max_new_tokens=8), resources=EvaluateResources(cpus_per_actor=1, batch_size=3))
ROWS_PER_PART, PER_PART = 9, 4


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    torch.set_num_threads(1)
    return Student(model_id=str(save_tiny_student(tmp_path_factory.mktemp("student"))))


def write_records(root: Path, labels: list[Label] = LABELS) -> Artifact:
    artifact = open_artifact(str(root), "prepare", {"labels": [label.name for label in labels]}, {})
    if not artifact.is_complete:
        with artifact.write() as draft:
            draft.write_rows(Record, "records", RECORDS, rows_per_part=ROWS_PER_PART)
            draft.write_rows(Label, "labels", labels)
            draft.counts.update(f"records_{record.split}" for record in RECORDS)
    return artifact


def task() -> Task:
    return build_task(RareDisease(), LABELS, LENGTH)


def ask(
    root: Path, student: Student, mode: Mode, splits: tuple[Split, ...], config: Evaluate = CONFIG, **more: Any
) -> Artifact:
    records = write_records(root, **more)
    return answer_records(str(root), config, RareDisease(), LENGTH, records, student, None, mode=mode, splits=splits)


@pytest.fixture(scope="module")
def answered(
    ray_cluster: None, student: Student, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[Mode, tuple[Split, ...]], Artifact]:
    asked: list[tuple[Mode, tuple[Split, ...]]] = [
        ("free", ("test",)), ("constrained", ("test",)), ("rank", ("train", "validation")),
    ]  # fmt: skip
    root = tmp_path_factory.mktemp("answers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "RECORDS_PER_PART", PER_PART)
        return {(mode, splits): ask(root, student, mode, splits) for mode, splits in asked}


def directly(student: Student, records: list[Record], mode: Mode) -> list[Any]:
    """The same questions to the student itself, one at a time."""
    answers = Answers(labels=tuple(label.label_id for label in LABELS), length=LENGTH, write=task().answer)
    asked = StudentGenerator(student, CONFIG.generation, answers=answers, batch_size=1)
    prompts = [task().prompt(record) for record in records]
    return list({"free": asked.generate, "constrained": asked.choose, "rank": asked.rank}[mode](prompts))


def test_written_answers_are_those_of_the_student_to_the_records_of_the_split(
    answered: dict[Any, Artifact], student: Student
) -> None:
    held_out = [record for record in RECORDS if record.split == "test"]
    for mode, method in (("free", "base student"), ("constrained", "base student, constrained")):
        rows = answered[mode, ("test",)].rows(Prediction, "answers")
        assert [row.record_id for row in rows] == [record.record_id for record in held_out]
        assert [row.text for row in rows] == directly(student, held_out, mode)  # type: ignore[arg-type]
        assert [row.labels for row in rows] == [task().parse(row.text).labels for row in rows]
        assert {(row.method, *row.scores) for row in rows} == {(method,)}
    known = {label.label_id for label in LABELS}
    for row in rows:
        assert row.reason is None
        assert len(set(row.labels)) == LENGTH
        assert set(row.labels) <= known


def test_a_ranking_holds_every_label_with_its_probability_likeliest_first(
    answered: dict[Any, Artifact], student: Student
) -> None:
    asked = [record for record in RECORDS if record.split != "test"]
    rows = answered["rank", ("train", "validation")].rows(Prediction, "answers")
    assert [row.record_id for row in rows] == [record.record_id for record in asked]
    for row, logps in zip(rows, directly(student, asked, "rank"), strict=True):
        assert (row.method, row.reason, row.text) == ("base student, ranked", None, "")
        total = sum(math.exp(logp) for logp in logps)
        expected = {label.label_id: math.exp(logp) / total for label, logp in zip(LABELS, logps, strict=True)}
        assert dict(zip(row.labels, row.scores, strict=True)) == pytest.approx(expected)
        assert row.scores == sorted(row.scores, reverse=True)
        assert sum(row.scores) == pytest.approx(1)


def test_each_part_holds_the_answers_to_so_many_records(answered: dict[Any, Artifact]) -> None:
    artifact = answered["rank", ("train", "validation")]
    ids = [read_part(artifact.file_uri(file.path))["record_id"].to_pylist() for file in artifact.table_files("answers")]
    parts = [RECORDS[start : start + ROWS_PER_PART] for start in range(0, len(RECORDS), ROWS_PER_PART)]
    ranges = [part[start : start + PER_PART] for part in parts for start in range(0, len(part), PER_PART)]
    assert ids == [[record.record_id for record in some if record.split != "test"] for some in ranges]
    assert artifact.manifest.counts == {"answers": len(list(itertools.chain(*ids)))}
    assert all(verify(one.uri) == [] for one in answered.values())


def test_answers_that_cannot_be_read_are_counted(answered: dict[Any, Artifact]) -> None:
    artifact = answered["free", ("test",)]
    rows = artifact.rows(Prediction, "answers")
    unread = [row for row in rows if row.reason]
    assert unread
    assert sum(artifact.manifest.dropped.values()) == len(unread)


class Unasked:
    """Nobody may ask the student."""

    def __init__(self, *_: Any) -> None:
        raise UserError("the student was asked again")


def test_what_was_answered_before_a_run_was_cut_off_is_not_asked_again(
    ray_cluster: None, answered: dict[Any, Artifact], student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "RECORDS_PER_PART", PER_PART)
    write_records(tmp_path)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Artifact, "_publish", die)
        ask(tmp_path, student, "rank", ("train", "validation"))
    # other resources make the same parts
    with monkeypatch.context() as patched:
        patched.setattr(module, "StudentActor", Unasked)
        made = ask(tmp_path, student, "rank", ("train", "validation"), replace(CONFIG, {"resources.batch_size": 1}))
    first = answered["rank", ("train", "validation")]
    assert made.manifest.files == first.manifest.files
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_mode_asks_anew_for_its_own_settings_only(student: Student, tmp_path: Path) -> None:
    def name(mode: Mode, **generation: Any) -> str:
        changes = {f"generation.{key}": value for key, value in generation.items()}
        asked = module.Asked(
            student=student, adapter=None, generation=replace(CONFIG, changes).generation, mode=mode,
            splits=("test",), task=RareDisease(), length=LENGTH,
        )  # fmt: skip
        return open_artifact(str(tmp_path), "answer", asked.settings(), {}).name

    assert name("free") == name("free", modes=["free", "rank"], normalise="mean")
    assert name("free") != name("free", max_new_tokens=9)
    assert name("rank") == name("rank", modes=["free", "rank"], max_new_tokens=9)
    assert name("rank") != name("rank", normalise="mean")
    assert len({name("free"), name("constrained"), name("rank")}) == 3


def test_a_label_that_an_answer_cannot_name_is_told_before_work(
    student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "map_parts", lambda *_, **__: pytest.fail("work was started"))
    broken = [*LABELS[:3], Label(label_id="OMIM:9", name="Disease\nof two lines"), *LABELS[3:]]
    with pytest.raises(
        UserError, match=r"constrained: label 'OMIM:9' \('Disease\\nof two lines'\) cannot be read back"
    ):
        ask(tmp_path, student, "constrained", ("test",), labels=broken)
