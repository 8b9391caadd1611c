"""Every task conforms to the interface; a new one joins `TASKS`."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mint_ray.records import Label, Message, Phenotype, Record
from mint_ray.tasks import Answer, Task, build_task, make_labels
from mint_ray.tasks.config import PANNUKE, AnyTask, ImageLabel, NamedLabel, RareDisease, TissueType
from mint_ray.tasks.numbered_lists import describe_random_lists, index_names, parse_list, write_list, write_request
from tests.tasks.conformance import check_task

LENGTH = 3
RECORD = Record(
    record_id="r",
    group_id="g",
    label_id="OMIM:154700",
    text="A tall boy with ectopia lentis.",
    phenotypes=[Phenotype(id="HP:0001166", label="Arachnodactyly"), Phenotype(id="HP:0000343", label="Long philtrum")],
    image_uri="r.jpg",
    fields={"age": "P4Y", "sex": "MALE"},
)


class ImagingModality:
    """Technique of an image, named from its report: a task written by the README's steps."""

    modalities = ("text",)
    show_image = False

    def __init__(self, labels: Sequence[Label], length: int) -> None:
        self.labels, self.length = tuple(labels), length
        self.names = {label.label_id: label.name for label in labels}
        self.ids = index_names(labels, str.lower)

    def note(self, record: Record) -> str:
        return record.text or ""

    def prompt(self, record: Record) -> list[Message]:
        request = write_request("List the likely techniques", "TECHNIQUES:", self.length)
        return [Message(role="user", content=f"{self.note(record)}\n\n{request}")]

    def answer(self, label_ids: Sequence[str]) -> str:
        return write_list("TECHNIQUES:", [self.names[label_id] for label_id in label_ids])

    def parse(self, text: str) -> Answer:
        return parse_list(text, "TECHNIQUES:", self.length, lambda name: self.ids.get(name.lower(), ""))

    def find_label_leak(self, record: Record) -> str | None:
        name = self.names.get(record.label_id or "")
        return name if name and name.lower() in self.note(record).lower() else None

    def ablate(self, record: Record, modality: str) -> Record:
        if modality != "text":
            raise ValueError(f"expected one of text, got {modality!r}")
        return dataclasses.replace(record, text=None)

    def caveats(self) -> list[str]:
        return [describe_random_lists(self.length, len(self.labels))]


def rare_disease() -> tuple[Task, Record]:
    names = {"OMIM:154700": ["Marfan syndrome"], "OMIM:163950": ["Noonan syndrome 1"], "OMIM:142900": ["Holt-Oram"]}
    return build_task(RareDisease(), make_labels(names, RareDisease()), LENGTH), RECORD


def image_label() -> tuple[Task, Record]:
    names = tuple(NamedLabel(label_id=name, name=name) for name in ("nevus", "melanoma", "keratosis"))
    config = ImageLabel(names=names, show_image=False, visible_fields=("age", "sex"))
    labels = make_labels({named.label_id: [] for named in names}, config)
    return build_task(config, labels, LENGTH), dataclasses.replace(RECORD, label_id="nevus")


def tissue_type() -> tuple[Task, Record]:
    labels = make_labels({named.label_id: [] for named in PANNUKE}, TissueType())
    return build_task(TissueType(), labels, LENGTH), dataclasses.replace(RECORD, label_id="HeadNeck")


def imaging_modality() -> tuple[Task, Record]:
    labels = [Label(label_id=name, name=name) for name in ("radiograph", "ultrasound", "tomography")]
    return ImagingModality(labels, LENGTH), dataclasses.replace(RECORD, label_id="ultrasound")


TASKS = [rare_disease, image_label, tissue_type, imaging_modality]


@pytest.mark.parametrize("make", TASKS, ids=lambda make: make.__name__)
def test_it_conforms(make: Callable[[], tuple[Task, Record]]) -> None:
    task, record = make()
    check_task(task, record, LENGTH)


@given(make=st.sampled_from(TASKS), text=st.text())
def test_no_text_makes_parsing_fail(make: Callable[[], tuple[Task, Record]], text: str) -> None:
    answer = make()[0].parse(text)
    assert len(answer.labels) == len(answer.names) <= LENGTH
    assert (answer.reason is None) == bool(answer.labels)


@given(make=st.sampled_from(TASKS), indices=st.lists(st.integers(0, 2), min_size=1, max_size=LENGTH))
def test_every_list_of_labels_is_parsed_back(make: Callable[[], tuple[Task, Record]], indices: list[int]) -> None:
    task, _ = make()
    label_ids = [task.labels[index].label_id for index in indices]
    assert task.parse(task.answer(label_ids)).labels == label_ids


def test_all_settings_are_tested() -> None:
    kinds = {member.__dataclass_fields__["kind"].default for member in get_args(get_args(AnyTask)[0])}
    assert kinds == {make.__name__ for make in TASKS} - {"imaging_modality"}


def test_importing_the_settings_loads_no_heavy_package() -> None:
    heavy = ("torch", "ray", "transformers", "scipy", "sklearn", "pyhpo")
    code = f"import sys, mint_ray.tasks, mint_ray.samplers; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
