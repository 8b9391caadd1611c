"""Every teacher passes the conformance suite; so does a new one that follows the steps of the README."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

import mint_ray.teachers
from mint_ray.records import Label, Record, TeacherScores
from mint_ray.teachers import FitReport, Teacher, build_teacher, teacher_inputs
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
from mint_ray.teachers.rankings import rank_labels
from tests.encoders import save_tiny_bert
from tests.teachers.conformance import CHECKS, LABELS, check_teacher, fit_and_reload
from tests.teachers.tiny_clip import save_tiny_clip
from tests.tiny import save_tiny_student
from tests.vision_students import save_tiny_vlm


def ontology(tmp_path: Path) -> AnyTeacher:
    return Ontology()


def table(tmp_path: Path) -> AnyTeacher:
    path = tmp_path / "scores.csv"
    rows = [f"r{r},{label.label_id},{(r * 7 + i * 3) % 5}" for r in (1, 2, 3) for i, label in enumerate(LABELS)]
    path.write_text("\n".join(["record_id,label_id,score", *rows]) + "\n")
    return Table(uri=str(path))


def imported(tmp_path: Path) -> AnyTeacher:
    return Imported(path="tests.teachers.longest_name:LongestNameTeacher", options={"step": 0.5})


def generative(tmp_path: Path) -> AnyTeacher:
    model = save_tiny_student(tmp_path / "model")
    return Generative(model_id=str(model), prompt="{phenotypes}, not {excluded_phenotypes}. Which?")


def generative_image(tmp_path: Path) -> AnyTeacher:
    model = save_tiny_vlm(tmp_path / "vlm")
    prompt = "{phenotypes}, not {excluded_phenotypes}. Which?"
    return Generative(model_id=str(model), prompt=prompt, show_image=True)


def clip(tmp_path: Path) -> AnyTeacher:
    model = save_tiny_clip(tmp_path / "clip")
    return Clip(model_id=str(model), text_template="{phenotypes}, not {excluded_phenotypes}")


def fusion(tmp_path: Path) -> AnyTeacher:
    template = "{phenotypes}, not {excluded_phenotypes}."
    text = FusionText(model_id=str(save_tiny_bert(tmp_path / "bert")), template=template)
    return Fusion(text=text, phenotypes=True, hidden_size=8, num_train_epochs=2)


def ensemble(tmp_path: Path) -> AnyTeacher:
    two_labels = tuple(label.label_id for label in LABELS[:2])
    members = (
        Member(teacher=table(tmp_path), temperature=0.5),
        Member(teacher=imported(tmp_path), labels=two_labels),
    )
    return Ensemble(members=members, weights="learned")


@pytest.fixture(
    scope="module",
    params=[ontology, table, imported, generative, generative_image, clip, fusion, ensemble],
    ids=lambda make: make.__name__,
)
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AnyTeacher:
    torch.set_num_threads(1)
    make: Callable[[Path], AnyTeacher] = request.param
    return make(tmp_path_factory.mktemp(make.__name__))


@pytest.fixture(scope="module")
def teacher(config: AnyTeacher, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return fit_and_reload(lambda: build_teacher(config), tmp_path_factory.mktemp("saved") / "teacher")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_teacher_passes_the_check(teacher: Teacher, check: Callable[[Teacher], None]) -> None:
    check(teacher)


def test_what_a_teacher_reads_has_an_identity(config: AnyTeacher) -> None:
    assert all(teacher_inputs(config).values())


class NameLengthTeacher:
    """A toy teacher, written as the README says."""

    def __init__(self) -> None:
        self.labels: list[Label] = []

    def fit(self, labels: Sequence[Label], records: Sequence[Record]) -> FitReport:
        self.labels = list(labels)
        return FitReport(counts={"labels": len(labels)})

    def save(self, folder: Path) -> None:
        (folder / "labels.json").write_text(json.dumps([[label.label_id, label.name] for label in self.labels]))

    def load(self, folder: Path) -> None:
        pairs = json.loads((folder / "labels.json").read_text())
        self.labels = [Label(label_id=label_id, name=name) for label_id, name in pairs]

    def score(self, records: Sequence[Record]) -> list[TeacherScores]:
        ids, lengths = [label.label_id for label in self.labels], [len(label.name) for label in self.labels]
        return [rank_labels(record, "name_length", ids, lengths) for record in records]


class LeakyTeacher(NameLengthTeacher):
    """A faulty one, whose scores depend on the batch."""

    def score(self, records: Sequence[Record]) -> list[TeacherScores]:
        ids, lengths = [label.label_id for label in self.labels], [len(label.name) + 0.0 for label in self.labels]
        lengths[0] += len(records)
        return [rank_labels(record, "leaky", ids, lengths) for record in records]


def test_a_new_teacher_passes_the_suite(tmp_path: Path) -> None:
    check_teacher(NameLengthTeacher, tmp_path / "teacher")


def test_the_example_of_the_readme_passes_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(mint_ray.teachers.__file__).parent / "README.md").read_text(encoding="utf-8")
    code = textwrap.dedent(readme.split("```python\n")[1].split("```")[0].rstrip(" "))
    (tmp_path / "my_module.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = Imported(path="my_module:LongNames", options={"factor": 0.5})
    check_teacher(lambda: build_teacher(config), tmp_path / "teacher")
    assert teacher_inputs(config)["factor"] == "0.5"


def test_the_suite_rejects_a_teacher_whose_scores_depend_on_the_batch(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check_teacher(LeakyTeacher, tmp_path / "teacher")
