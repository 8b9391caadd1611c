"""Templates hold what they name of a record, and nothing else."""

from __future__ import annotations

import dataclasses

from mint_ray.records import Phenotype, Record
from mint_ray.teachers.templates import render_nonempty, render_template

RECORD = Record(
    record_id="r", group_id="g", text="A boy of four.", fields={"age": "P4Y"},
    phenotypes=[Phenotype(id="HP:1", label="Seizure"), Phenotype(id="HP:2", label="Cough", excluded=True)],
)  # fmt: skip


def test_placeholders_are_replaced_by_the_values_of_the_record() -> None:
    template = "{phenotypes}|{excluded_phenotypes}|{fields.age}|{fields.sex}"
    assert render_template(template, RECORD) == render_nonempty(template, RECORD) == "Seizure|Cough|P4Y|"


def test_braces_in_a_text_are_not_placeholders() -> None:
    record = dataclasses.replace(RECORD, text="{phenotypes}")
    assert render_template("{text}", record) == "{phenotypes}"


def test_a_template_without_any_value_is_empty() -> None:
    assert render_template("Sex: {fields.sex}", RECORD) == "Sex: "
    assert render_nonempty("Sex: {fields.sex}", RECORD) is None
