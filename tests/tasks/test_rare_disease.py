"""Notes, answers and label leaks of the rare disease task, on records written by hand."""

from __future__ import annotations

import pytest

from mint_ray.config.loader import from_data
from mint_ray.ontology import load_ontology
from mint_ray.records import Label, Phenotype, Record
from mint_ray.tasks import Answer, Task, build_task
from mint_ray.tasks.config import RareDisease

LABELS = [
    Label(label_id="OMIM:163950", name="Noonan syndrome 1", synonyms=["NS1"]),
    Label(label_id="OMIM:615355", name="Noonan syndrome 8"),
    Label(label_id="OMIM:154700", name="Marfan syndrome"),
    Label(label_id="OMIM:104300", name="Alzheimer's disease", synonyms=["AD"]),
    Label(label_id="OMIM:162200", name="Neurofibromatosis, type 1", synonyms=["von Recklinghausen disease"]),
    Label(label_id="OMIM:115200", name="Cardiomyopathy, dilated, 1A"),
]
SEIZURE, PHILTRUM, EPICANTHUS = "HP:0001250", "HP:0000343", "HP:0000286"
SHORT_STATURE, HEARING, CARDIOMYOPATHY = "HP:0004322", "HP:0000365", "HP:0001638"


def task(length: int = 3, **settings: object) -> Task:
    return build_task(from_data(RareDisease, settings), LABELS, length)


def record(*present: str, absent: tuple[str, ...] = (), label_id: str = "OMIM:154700", text: str | None = None,
           **fields: str) -> Record:  # fmt: skip
    names = load_ontology().names
    return Record(
        record_id="r",
        group_id="g",
        label_id=label_id,
        text=text,
        phenotypes=[
            *(Phenotype(id=term, label=names[term]) for term in present),
            *(Phenotype(id=term, label=names[term], excluded=True) for term in absent),
        ],
        fields=fields,
    )


def test_the_note_has_age_sex_and_findings_but_neither_face_nor_gene() -> None:
    case = record(
        SEIZURE, PHILTRUM, SHORT_STATURE, absent=(HEARING, EPICANTHUS), age="P4Y3M", sex="FEMALE", gene="FBN1"
    )
    note = task().note(case)
    assert note.startswith("A 4-year-old girl has ")
    assert "short stature" in note
    assert "seizure" in note
    assert note.endswith(" Looked for and absent: hearing impairment.")
    for hidden in ("philtrum", "picanthus", "FBN1"):
        assert hidden not in note


def test_face_and_gene_are_in_the_note_if_not_hidden() -> None:
    note = task(hide_face=False, hide_gene=False).note(record(SEIZURE, PHILTRUM, gene="FBN1"))
    assert "long philtrum" in note
    assert "FBN1" in note


@pytest.mark.parametrize(
    ("fields", "opening"),
    [
        ({}, "A patient"),
        ({"sex": "MALE"}, "A male patient"),
        ({"age": "P80Y", "sex": "FEMALE"}, "An 80-year-old woman"),
        ({"age": "P18Y", "sex": "MALE"}, "An 18-year-old man"),
        ({"age": "P17Y11M", "sex": "MALE"}, "A 17-year-old boy"),
        ({"age": "P30Y"}, "A 30-year-old adult"),
        ({"age": "P8M"}, "An 8-month-old child"),
        ({"age": "P0D", "sex": "FEMALE"}, "A newborn girl"),
        ({"age": "long ago", "sex": "MALE"}, "A male patient"),
    ],
)
def test_age_and_sex_are_written_in_words(fields: dict[str, str], opening: str) -> None:
    assert task().note(record(SEIZURE, **fields)) == f"{opening} has seizure."


def test_the_most_specific_findings_are_kept() -> None:
    infantile_spasms = "HP:0012469"
    note = task(max_findings=1, max_absent=0).note(record(SEIZURE, infantile_spasms, absent=(HEARING,)))
    assert note == "A patient has infantile spasms."


def test_terms_are_in_lower_case_unless_they_are_acronyms_or_names() -> None:
    ids = {name: term for term, name in load_ontology().names.items()}
    for label, expected in {
        "Seizure": "seizure",
        "EEG abnormality": "EEG abnormality",
        "Chiari malformation": "Chiari malformation",
        "2-3 toe syndactyly": "2-3 toe syndactyly",
        "Aplasia/Hypoplasia of the lungs": "aplasia/hypoplasia of the lungs",
    }.items():
        assert task().note(record(ids[label])) == f"A patient has {expected}."


def test_a_text_is_kept_except_for_the_gene() -> None:
    case = record(SEIZURE, text="Tall boy, FBN1 variant; FBN10 normal.", gene="FBN1")
    assert task().note(case) == "Tall boy, [gene] variant; FBN10 normal."
    assert task(hide_gene=False).note(case) == case.text


def test_the_prompt_shows_the_note_and_a_skeleton_of_exactly_the_length() -> None:
    case = record(SEIZURE)
    system, user = task(length=4).prompt(case)
    assert (system.role, user.role) == ("system", "user")
    assert "genetic counsellor" in system.content
    assert user.content.startswith(task().note(case))
    skeleton = user.content.split("POTENTIAL_DISEASES:\n")[1].splitlines()
    assert [line.split(".")[0] for line in skeleton] == ["1", "2", "3", "4"]


def test_an_answer_is_the_header_and_quoted_names() -> None:
    answer = task().answer(["OMIM:154700", "OMIM:104300"])
    assert answer == "POTENTIAL_DISEASES:\n1. 'Marfan syndrome'\n2. 'Alzheimer's disease'"


@pytest.mark.parametrize(
    ("line", "label_id"),
    [
        ("1. 'Noonan syndrome 1'", "OMIM:163950"),
        ('1) "noonan  SYNDROME-1".', "OMIM:163950"),
        ("**1.** `Noonan syndrome, type I`", "OMIM:163950"),
        ("1. “Noonan syndrome 1”, because of the heart", "OMIM:163950"),
        ("1. Noonan syndrome 1 (OMIM:163950)", "OMIM:163950"),
        ("1. Noonan syndrome 1 (OMIM:615355)", ""),
        ("1. OMIM:163950", "OMIM:163950"),
        ("1. 'NS1'", "OMIM:163950"),
        ("1. 'Noonan syndrome VIII'", "OMIM:615355"),
        ("1. 'Noonan syndrome 5'", ""),
        ("1. 'Noonan syndrome'", ""),
        ("1. 'Noonan syndrome 18'", ""),
        ("1. 'Alzheimer's disease' (late)", "OMIM:104300"),
        ("1. Alzheimer disease", "OMIM:104300"),
        ("1. 'neurofibromatosis I'", "OMIM:162200"),
        ("1. 'Neurofibromatosis, type 2'", ""),
        ("1. Von Recklinghausen Disease", "OMIM:162200"),
        ("1. ''", ""),
        ("1. '...'", ""),
    ],
)
def test_a_name_is_matched_only_with_the_same_number(line: str, label_id: str) -> None:
    for text in (line, f"POTENTIAL_DISEASES:\n{line}", f"Sure!\npotential diseases: {line}\n"):
        answer = task().parse(text)
        assert answer.reason is None
        assert answer.labels == [label_id], text


def test_unknown_and_repeated_names_keep_their_place() -> None:
    text = "POTENTIAL_DISEASES:\n1. 'Marfan syndrome'\n2. 'Sneezing syndrome'\n3. 'Marfan syndrome'"
    names = ["Marfan syndrome", "Sneezing syndrome", "Marfan syndrome"]
    assert task().parse(text) == Answer(labels=["OMIM:154700", "", "OMIM:154700"], names=names)


def test_a_malformed_answer_has_a_reason_and_no_labels() -> None:
    assert task().parse(" \n") == Answer(reason="empty")
    assert task().parse("It could be Marfan syndrome.") == Answer(reason="no_list")
    assert task().parse("1. Marfan syndrome\nPOTENTIAL_DISEASES:\n") == Answer(reason="no_list")
    assert task(length=1).parse("1. 'Marfan syndrome'\n2. 'Noonan syndrome 1'") == Answer(reason="too_many")


@pytest.mark.parametrize(
    ("text", "label_id", "leak"),
    [
        ("Known Marfan syndrome.", "OMIM:154700", "Marfan syndrome"),
        ("Known MARFAN-syndrome.", "OMIM:154700", "Marfan syndrome"),
        ("Looks like Noonan syndrome.", "OMIM:163950", "Noonan syndrome"),
        ("Looks like Noonan syndrome 8.", "OMIM:163950", "Noonan syndrome"),
        ("Father has dilated cardiomyopathy.", "OMIM:115200", "Cardiomyopathy"),
        ("Neurofibromatosis in the family.", "OMIM:162200", "Neurofibromatosis"),
        ("Von Recklinghausen disease.", "OMIM:162200", "von Recklinghausen disease"),
        ("Tested for NS1.", "OMIM:163950", "NS1"),
        ("An ad on the wall.", "OMIM:104300", None),
        ("Cardiomyopathies were excluded.", "OMIM:115200", None),
        ("A syndrome of unknown cause, a disease of the heart.", "OMIM:154700", None),
        ("Known Marfan syndrome.", "OMIM:163950", None),
    ],
)
def test_a_note_leaks_if_it_names_its_own_disease(text: str, label_id: str, leak: str | None) -> None:
    assert task().find_label_leak(record(text=text, label_id=label_id)) == leak


def test_visible_findings_leak_and_hidden_ones_do_not() -> None:
    assert task().find_label_leak(record(CARDIOMYOPATHY, label_id="OMIM:115200")) == "Cardiomyopathy"
    philtrum = [Label(label_id="X:1", name="Long philtrum 3")]
    case = record(PHILTRUM, SEIZURE, label_id="X:1")
    assert build_task(RareDisease(), philtrum, 1).find_label_leak(case) is None
    assert build_task(RareDisease(hide_face=False), philtrum, 1).find_label_leak(case) == "Long philtrum"


def test_each_modality_can_be_ablated() -> None:
    case = record(SEIZURE, PHILTRUM, absent=(EPICANTHUS, HEARING), text="A note.")
    assert [item.id for item in task().ablate(case, "face").phenotypes] == [SEIZURE, HEARING]
    body_gone = task().ablate(case, "body")
    assert [item.id for item in body_gone.phenotypes] == [PHILTRUM, EPICANTHUS]
    assert body_gone.text is None
    with pytest.raises(ValueError, match="expected one of face, body, got 'genome'"):
        task().ablate(case, "genome")


def test_the_caveats_say_that_findings_are_a_proxy_for_the_photograph() -> None:
    assert any("proxy for the photograph" in caveat for caveat in task().caveats())
