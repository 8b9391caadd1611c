"""What every teacher must do; a new one joins by giving a fixture."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mint_ray.records import Label, Phenotype, Record
from mint_ray.teachers import Teacher, build_teacher
from mint_ray.teachers.config import (
    AnyTeacher,
    Clip,
    Ensemble,
    Fusion,
    FusionText,
    Generative,
    Imported,
    Member,
    Ontology,
    Table,
)
from tests.encoders import save_tiny_bert
from tests.teachers.clips import save_tiny_clip
from tests.tiny import save_tiny_student
from tests.vision_students import save_tiny_seeing

LABELS = [
    Label(label_id="OMIM:154700", name="Marfan syndrome"),
    Label(label_id="OMIM:142900", name="Holt-Oram syndrome"),
    Label(label_id="OMIM:219700", name="Cystic fibrosis"),
]


def record(number: int, *terms: str, split: str = "train") -> Record:
    phenotypes = [Phenotype(id=term.lstrip("!"), label="", excluded=term.startswith("!")) for term in terms]
    return Record(
        record_id=f"r{number}", group_id=f"g{number}", label_id=LABELS[0].label_id, phenotypes=phenotypes, split=split
    )  # type: ignore[arg-type]


RECORDS = [
    record(1, "HP:0001166", "HP:0001083"),  # arachnodactyly, ectopia lentis
    record(2, "HP:0001631", "HP:0009777", split="validation"),  # atrial septal defect, absent thumb
    record(3, "HP:0006538", "!HP:0001166", split="test"),  # recurrent bronchopulmonary infections
]


def ontology(tmp_path: Path) -> AnyTeacher:
    return Ontology()


def table(tmp_path: Path) -> AnyTeacher:
    path = tmp_path / "scores.csv"
    rows = [f"r{r},{label.label_id},{(r * 7 + i * 3) % 5}" for r in (1, 2, 3) for i, label in enumerate(LABELS)]
    path.write_text("\n".join(["record_id,label_id,score", *rows]) + "\n")
    return Table(uri=str(path))


def imported(tmp_path: Path) -> AnyTeacher:
    return Imported(path="tests.teachers.longest:LongestName", options={"step": 0.5})


def generative(tmp_path: Path) -> AnyTeacher:
    torch.set_num_threads(1)
    return Generative(model_id=str(save_tiny_student(tmp_path / "model")), prompt="{findings}, not {absent}. Which?")


def generative_viewer(tmp_path: Path) -> AnyTeacher:
    torch.set_num_threads(1)
    model = save_tiny_seeing(tmp_path / "seeing")
    return Generative(model_id=str(model), prompt="{findings}, not {absent}. Which?", shows_image=True)


def clip(tmp_path: Path) -> AnyTeacher:
    torch.set_num_threads(1)
    return Clip(model_id=str(save_tiny_clip(tmp_path / "clip")), text_template="{findings}, not {absent}")


def fusion(tmp_path: Path) -> AnyTeacher:
    torch.set_num_threads(1)
    text = FusionText(model_id=str(save_tiny_bert(tmp_path / "bert")), template="{findings}, not {absent}.")
    return Fusion(text=text, findings=True, width=8, epochs=2)


def ensemble(tmp_path: Path) -> AnyTeacher:
    few = tuple(label.label_id for label in LABELS[:2])
    members = (
        Member(teacher=table(tmp_path), temperature=0.5),
        Member(teacher=imported(tmp_path), labels=few),
    )
    return Ensemble(members=members, weights="learned")


@pytest.fixture(
    params=[ontology, table, imported, generative, generative_viewer, clip, fusion, ensemble],
    ids=lambda make: make.__name__,
)
def teacher(request: pytest.FixtureRequest, tmp_path: Path) -> Teacher:
    make: Callable[[Path], AnyTeacher] = request.param
    config = make(tmp_path)
    fitted = build_teacher(config)
    fitted.fit(LABELS, RECORDS)
    folder = tmp_path / "teacher"
    folder.mkdir()
    fitted.save(folder)
    loaded = build_teacher(config)
    loaded.load(folder)
    assert loaded.score(RECORDS) == fitted.score(RECORDS)
    return loaded


def test_there_is_one_ranking_per_record_in_order(teacher: Teacher) -> None:
    scored = teacher.score(RECORDS)
    assert [(row.record_id, row.split) for row in scored] == [(row.record_id, row.split) for row in RECORDS]


def test_every_label_is_ranked_once_best_first(teacher: Teacher) -> None:
    for row in teacher.score(RECORDS):
        assert sorted(row.labels) == sorted(label.label_id for label in LABELS)
        assert row.scores == sorted(row.scores, reverse=True)


def test_a_record_is_ranked_alike_in_any_batch(teacher: Teacher) -> None:
    together = teacher.score(RECORDS)
    assert [teacher.score([row])[0] for row in RECORDS] == together
    assert teacher.score(RECORDS[::-1]) == together[::-1]


def test_it_survives_pickling(teacher: Teacher) -> None:
    assert pickle.loads(pickle.dumps(teacher)).score(RECORDS) == teacher.score(RECORDS)  # noqa: S301


def test_what_it_reads_has_an_identity(teacher: Teacher) -> None:
    assert all(teacher.inputs().values())
