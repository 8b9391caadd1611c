"""Names of diseases: normalization, spoken forms, synonyms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mint_ray.config.loader import UserError
from mint_ray.tasks import make_labels
from mint_ray.tasks.config import RareDisease
from mint_ray.tasks.disease_names import base_name, is_abbreviation, lower_first, normalize, spoken_forms


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Noonan syndrome 5", "Noonan syndrome"),
        ("Neurofibromatosis, type 1", "Neurofibromatosis"),
        ("Pseudohypoparathyroidism Ia", "Pseudohypoparathyroidism"),
        ("Mitochondrial DNA depletion syndrome 13 (encephalomyopathic type)", "Mitochondrial DNA depletion syndrome"),
        ("Marfan syndrome", "Marfan syndrome"),
        ("Usher syndrome type IIA", "Usher syndrome"),
    ],
)
def test_the_base_name_has_no_number(name: str, expected: str) -> None:
    assert base_name(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Cardiomyopathy, dilated, 1A", "dilated cardiomyopathy 1A"),
        ("Keratoderma, palmoplantar, punctate type IA", "palmoplantar punctate keratoderma type IA"),
        ("Intellectual developmental disorder, autosomal dominant 77",
         "autosomal dominant intellectual developmental disorder 77"),
        ("Adrenal hyperplasia, congenital, due to 21-hydroxylase deficiency",
         "congenital adrenal hyperplasia due to 21-hydroxylase deficiency"),
    ],
)  # fmt: skip
def test_an_inverted_name_gets_its_spoken_form(name: str, expected: str) -> None:
    assert expected in spoken_forms(name)


def test_commas_of_a_list_are_kept() -> None:
    assert spoken_forms("Short stature, optic nerve atrophy, and Pelger-Huet anomaly") == []
    assert spoken_forms("Marfan syndrome") == []


def test_different_numbers_stay_different() -> None:
    names = ["Noonan syndrome 1", "Noonan syndrome 2", "Noonan syndrome 11", "Noonan syndrome", "Noonan syndrome 1A",
             "Noonan syndrome 1B", "Noonan syndrome 5"]  # fmt: skip
    assert len({normalize(name) for name in names}) == len(names)
    assert normalize("Usher syndrome, type IIA") == normalize("usher syndrome 2a")


def test_a_label_has_the_names_of_the_source_the_annotations_and_the_abbreviation() -> None:
    [label] = make_labels({"OMIM:154700": ["Marfan's disorder; MFD", "Fibrillinopathy"]}, RareDisease())
    assert label.name == "Marfan's disorder"
    assert set(label.synonyms) == {"MFD", "Fibrillinopathy", "Marfan syndrome"}


def test_a_synonym_that_two_labels_share_is_dropped() -> None:
    names = {"X:1": ["Alpha syndrome", "Shared name", "Beta syndrome"], "X:2": ["Beta syndrome", "shared  NAME", "Own"]}
    alpha, beta = make_labels(names, RareDisease())
    assert (alpha.name, alpha.synonyms) == ("Alpha syndrome", [])
    assert (beta.name, beta.synonyms) == ("Beta syndrome", ["Own"])


def test_two_labels_of_one_name_are_an_error_that_names_both() -> None:
    with pytest.raises(UserError, match="labels X:1 and X:2 are both called 'alpha SYNDROME'"):
        make_labels({"X:1": ["Alpha syndrome"], "X:2": ["alpha SYNDROME"]}, RareDisease())


def test_synonyms_are_read_from_a_file_of_either_kind(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("label_id,synonym\nX:1,First disease\nX:9,Unused\n")
    (tmp_path / "s.jsonl").write_text(json.dumps({"label_id": "X:1", "synonym": "First disease"}) + "\n")
    for name in ("s.csv", "s.jsonl"):
        [label] = make_labels({"X:1": ["Alpha syndrome"]}, RareDisease(synonyms=str(tmp_path / name)))
        assert label.synonyms == ["First disease"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.csv", "label_id,synonym\nX:1,\n", r"s\.csv:2: synonym: expected a text, got ''"),
        ("s.csv", "label_id,name\nX:1,a\n", r"s\.csv:2: synonym: expected a text, got None"),
        ("s.jsonl", "{\n", r"s\.jsonl:1: not JSON"),
        ("s.txt", "x", r"s\.txt: expected a name ending in"),
    ],
)
def test_an_invalid_synonym_file_is_a_user_error(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        make_labels({"X:1": ["Alpha syndrome"]}, RareDisease(synonyms=str(tmp_path / name)))


def test_only_short_names_in_capitals_are_abbreviations() -> None:
    assert is_abbreviation("NS1")
    assert not is_abbreviation("Rett")
    assert not is_abbreviation("SHORTSYND")


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("Seizure", "seizure"),
        ("EEG abnormality", "EEG abnormality"),
        ("Chiari malformation", "Chiari malformation"),
        ("2-3 toe syndactyly", "2-3 toe syndactyly"),
        ("Aplasia/Hypoplasia of the lungs", "aplasia/hypoplasia of the lungs"),
    ],
)
def test_a_term_starts_in_lower_case_unless_it_is_an_acronym_or_a_name(label: str, expected: str) -> None:
    assert lower_first(label) == expected
