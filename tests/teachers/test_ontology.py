"""Labels are ranked by semantic similarity, without the publications of held-out records."""

from __future__ import annotations

import pytest

from mint_ray.ontology import load_ontology, read_annotations
from mint_ray.records import Record
from mint_ray.teachers.config import Ontology
from mint_ray.teachers.ontology import OntologyTeacher
from tests.teachers.conformance import LABELS, make_record


def fitted(records: list[Record], **settings: float) -> OntologyTeacher:
    teacher = OntologyTeacher(Ontology(**settings))
    teacher.fit(LABELS, records)
    return teacher


def test_the_disease_with_the_phenotypes_of_the_patient_is_first() -> None:
    teacher = fitted([])
    assert teacher.score([make_record(1, "HP:0001166", "HP:0001083")])[0].labels[0] == "OMIM:154700"
    assert teacher.score([make_record(2, "HP:0001631", "HP:0009777")])[0].labels[0] == "OMIM:142900"


def test_a_score_is_the_best_match_average_as_computed_by_hand() -> None:
    teacher = fitted([], absent_weight=0.0)
    patient = ["HP:0001166", "HP:0001631"]
    ontology = load_ontology()
    content = dict(zip(ontology.ids, teacher.content, strict=True))

    def resnik(a: str, b: str) -> float:
        return max(content[term] for term in ontology.ancestors(a) & ontology.ancestors(b))

    profile: dict[str, float] = {}
    for row in read_annotations():
        if row.disease_id == "OMIM:142900" and row.aspect == "P" and not row.excluded and row.frequency != 0:
            term = ontology.resolve(row.term_id)
            assert term is not None
            profile[term] = max(profile.get(term, 0), 0.5 if row.frequency is None else row.frequency)
    to_disease = sum(max(resnik(a, b) for b in profile) for a in patient) / len(patient)
    to_patient = sum(profile[b] * max(resnik(a, b) for a in patient) for b in profile) / sum(profile.values())
    scored = teacher.score([make_record(1, *patient)])[0]
    assert scored.scores[scored.labels.index("OMIM:142900")] == pytest.approx((to_disease + to_patient) / 2, rel=1e-5)


def test_an_excluded_phenotype_counts_against_the_diseases_that_show_it() -> None:
    teacher = fitted([])
    present = ["HP:0001631"]

    def score(*terms: str) -> float:
        row = teacher.score([make_record(1, *terms)])[0]
        return row.scores[row.labels.index("OMIM:154700")]

    assert score(*present, "!HP:0001166") < score(*present)
    assert score(*present, "!HP:0100807") < score(*present)  # an ancestor: all its descendants are excluded


def test_annotations_that_cite_a_held_out_publication_are_dropped_and_counted() -> None:
    cited = next(
        reference
        for row in read_annotations()
        if row.disease_id == "OMIM:154700" and row.aspect == "P"
        for reference in row.references
        if reference.startswith("PMID")
    )

    def case(split: str) -> Record:
        return Record(record_id="x", group_id=cited, split=split, citations=[cited])  # type: ignore[arg-type]

    complete = OntologyTeacher(Ontology()).fit(LABELS, [case("train")])
    reduced = OntologyTeacher(Ontology()).fit(LABELS, [case("test")])
    num_dropped = reduced.dropped["annotation_cites_held_out_publication"]
    assert num_dropped > 0
    assert complete.dropped["annotation_cites_held_out_publication"] == 0
    assert reduced.counts["annotations"] == complete.counts["annotations"] - num_dropped


def test_a_record_without_a_known_phenotype_fails_with_a_reason() -> None:
    row = fitted([]).score([make_record(1, "HP:9999999", "HP:0000006")])[0]
    assert (row.status, row.reason, row.labels) == ("failed", "no_known_phenotype", [])
