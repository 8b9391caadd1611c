"""Prompts, answers and label leaks of the image tasks, on records written by hand."""

from __future__ import annotations

from typing import Any

import pytest

from mint_ray.config.loader import UserError
from mint_ray.records import Label, Message, Phenotype, Record
from mint_ray.tasks import Answer, Task, build_task, make_labels
from mint_ray.tasks.config import PANNUKE, ImageLabel, NamedLabel, TissueType

NAMES = (
    NamedLabel(label_id="nv", name="melanocytic nevus", synonyms=("mole", "naevus")),
    NamedLabel(label_id="mel", name="melanoma"),
    NamedLabel(label_id="akiec", name="actinic keratosis / intraepithelial carcinoma"),
    NamedLabel(label_id="7", name="Bowen's disease"),
)
RECORD = Record(
    record_id="r", group_id="g", label_id="mel", text="A melanoma of the back.", image_uri="images/r.jpg",
    phenotypes=[Phenotype(id="HP:0001250", label="Seizure")],
    fields={"sex": "male", "age": "45.0", "body_site": "back", "dx": "mel"},
)  # fmt: skip


def skin(length: int = 2, **settings: Any) -> Task:
    config = ImageLabel(names=NAMES, question="Which skin lesion is this?", **settings)
    return build_task(config, make_labels({named.label_id: [] for named in NAMES}, config), length)


def tissue(length: int = 5, **settings: Any) -> Task:
    config = TissueType(**settings)
    return build_task(config, make_labels({named.label_id: [] for named in PANNUKE}, config), length)


def test_the_prompt_has_the_candidates_in_order_and_nothing_of_the_record() -> None:
    assert skin(header="LESION:", system="A doctor.").prompt(RECORD) == [
        Message(role="system", content="A doctor."),
        Message(
            role="user",
            content="Which skin lesion is this?\n"
            "Candidates: 'melanocytic nevus', 'melanoma', 'actinic keratosis / intraepithelial carcinoma', "
            "'Bowen's disease'.\n\n"
            "List the 2 most likely ones, best first, exactly as:\nLESION:\n1. ''\n2. ''",
        ),
    ]
    assert skin().note(RECORD) == ""


def test_visible_fields_are_in_the_order_of_the_settings() -> None:
    task = skin(visible_fields=("age", "body_site", "height"), show_image=False)
    assert task.note(RECORD) == "age: 45.0; body site: back"
    assert task.prompt(RECORD)[-1].content.startswith("age: 45.0; body site: back\n\nWhich skin lesion")
    bare = Record(record_id="r", group_id="g")
    assert task.note(bare) == ""
    assert task.prompt(bare)[-1].content.startswith("Which skin lesion is this?\nCandidates:")


def test_tissues_are_those_of_the_paper_in_its_order() -> None:
    assert [label.name for label in tissue().labels] == [
        "Adrenal Glands", "Bile Duct", "Bladder", "Breast", "Cervix", "Colon", "Esophagus", "Head & Neck", "Kidney",
        "Liver", "Lung", "Ovarian", "Pancreatic", "Prostate", "Skin", "Stomach", "Testis", "Thyroid", "Uterus",
    ]  # fmt: skip
    system, user = tissue().prompt(RECORD)
    assert "pathologist" in system.content
    assert user.content.count("'Head & Neck'") == 1
    assert user.content.endswith("MOST_LIKELY_TISSUE:\n1. ''\n2. ''\n3. ''\n4. ''\n5. ''")


@pytest.mark.parametrize(
    ("line", "label_id"),
    [
        ("1. 'Head & Neck'", "HeadNeck"),
        ("1. head and neck.", "HeadNeck"),
        ("1) **Head-and-Neck**", "HeadNeck"),
        ("1. HeadNeck", "HeadNeck"),
        ("1. Head", ""),
        ("1. 'Bile-duct'", "Bile-duct"),
        ("1. Adrenal gland", "Adrenal_gland"),
        ("1. 'Ovary'", "Ovarian"),
        ("1. Œsophagus", ""),
        ("1. Oesophagus", "Esophagus"),
        ("1. 'Liver disease'", ""),
        ("1. ''", ""),
        ("1. '&'", ""),
    ],
)
def test_a_name_is_matched_with_labels_and_synonyms(line: str, label_id: str) -> None:
    for text in (line, f"MOST_LIKELY_TISSUE:\n{line}", f"Sure!\nmost likely tissue: {line}\n"):
        assert tissue().parse(text).labels == [label_id], text


def test_generic_words_distinguish_labels() -> None:
    names = (NamedLabel(label_id="a", name="disease"), NamedLabel(label_id="b", name="no disease"))
    config = ImageLabel(names=names)
    task = build_task(config, make_labels({"a": [], "b": []}, config), 2)
    assert task.parse("1. No disease\n2. Disease").labels == ["b", "a"]


def test_a_malformed_answer_has_a_reason_and_no_labels() -> None:
    assert skin().parse(" \n") == Answer(reason="empty")
    assert skin().parse("A melanoma.") == Answer(reason="no_list")
    assert skin().parse("1. melanoma\nMOST LIKELY:\n") == Answer(reason="no_list")
    assert skin().parse("1. mole\n2. melanoma\n3. mole") == Answer(reason="too_many")


@pytest.mark.parametrize(
    ("visible_fields", "label_id", "leak"),
    [
        ((), "mel", None),
        (("age", "sex"), "mel", None),
        (("dx",), "mel", "mel"),
        (("dx",), "nv", None),
        (("text",), "nv", "mole"),
        (("age",), "7", None),
    ],
)
def test_a_visible_field_leaks_if_it_names_the_label(
    visible_fields: tuple[str, ...], label_id: str, leak: str | None
) -> None:
    fields = {"age": "7", "sex": "male", "dx": "mel", "text": "Had a MOLE-like spot."}
    case = Record(record_id="r", group_id="g", label_id=label_id, fields=fields, text="melanoma, a mole")
    assert skin(visible_fields=visible_fields).find_label_leak(case) == leak


def test_each_modality_can_be_ablated() -> None:
    task = skin()
    ablated = task.ablate(RECORD, "image")
    assert (ablated.image_uri, ablated.text, ablated.fields) == (None, RECORD.text, RECORD.fields)
    assert task.ablate(RECORD, "text").text is None
    ablated = task.ablate(RECORD, "fields")
    assert (ablated.fields, ablated.phenotypes, ablated.image_uri) == ({}, [], RECORD.image_uri)
    with pytest.raises(ValueError, match="expected one of image, text, fields, got 'face'"):
        task.ablate(RECORD, "face")


def test_labels_are_those_of_the_records_in_the_order_of_the_names() -> None:
    config = ImageLabel(names=NAMES)
    labels = make_labels({"mel": ["MEL"], "nv": ["nv"]}, config)
    assert labels == [
        Label(label_id="nv", name="melanocytic nevus", synonyms=["mole", "naevus"]),
        Label(label_id="mel", name="melanoma"),
    ]
    with pytest.raises(UserError, match=r"^task\.names: no name for the label 'bcc' of the records"):
        make_labels({"mel": [], "bcc": []}, config)


def test_two_labels_of_one_name_are_an_error_that_names_both() -> None:
    names = (NamedLabel(label_id="a", name="Mole"), NamedLabel(label_id="b", name="Spot", synonyms=("mole",)))
    with pytest.raises(UserError, match="labels a and b are both called 'mole'"):
        make_labels({"a": [], "b": []}, ImageLabel(names=names))


def test_the_caveats_say_what_the_student_is_given() -> None:
    assert "given the image, and no other part" in skin().caveats()[0]
    assert "given the image and the coded fields age, sex, and no" in skin(visible_fields=("age", "sex")).caveats()[0]
    assert "given the coded fields age, and no" in skin(visible_fields=("age",), show_image=False).caveats()[0]
    assert "26.3% of cases" in tissue().caveats()[-1]
