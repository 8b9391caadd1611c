"""Tabular features are those of the training split, and encoders survive JSON."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mint_ray.records import Phenotype, Record
from mint_ray.teachers.fusion.tabular import ROW_NORM, FieldsEncoder, PhenotypeEncoder, parse_field

ROOT = "HP:0000118"
ARACHNODACTYLY, ECTOPIA_LENTIS, FACE_TERM = "HP:0001166", "HP:0001083", "HP:0000271"


def record(fields: dict[str, str] | None = None, *terms: str) -> Record:
    found = [Phenotype(id=term.lstrip("!"), label="", excluded=term.startswith("!")) for term in terms]
    return Record(record_id="r", group_id="g", fields=fields or {}, phenotypes=found)


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("4.5", "number", 4.5),
        ("nan", "number", None),
        ("old", "number", None),
        ("", "category", None),
        (" male ", "category", "male"),
        ("P4Y6M", "duration", math.log(1 + 4.5)),
        ("P0D", "duration", 0.0),
        ("P2W", "duration", math.log(1 + 14 / 365.25)),
        ("P", "duration", None),
        ("4 years", "duration", None),
    ],
)
def test_a_field_is_a_category_a_finite_number_or_none(text: str, kind: str, expected: object) -> None:
    found = parse_field(record({"x": text}), "x", kind)
    assert found == (pytest.approx(expected) if isinstance(expected, float) else expected)


def test_categories_of_two_training_records_are_known_and_all_others_share_a_column() -> None:
    train = [record({"sex": sex}) for sex in ("F", "F", "M", "M", "X")]
    encoder = FieldsEncoder.fit({"sex": "category"}, train)
    rows, known = encoder.transform([record({"sex": "M"}), record({"sex": "X"}), record({"sex": "?"}), record()])
    assert rows.tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 1], [0, 0, 0]]
    assert known.tolist() == [True, True, True, False]


def test_a_number_is_standardized_and_compared_with_the_quantiles_of_the_training_split() -> None:
    encoder = FieldsEncoder.fit({"age": "number"}, [record({"age": str(age)}) for age in range(0, 90, 10)])
    (low, middle, high), known = encoder.transform([record({"age": age}) for age in ("-1", "40", "1000")])
    std = np.std(np.arange(0, 90, 10))
    assert middle[:2].tolist() == pytest.approx([1, 0])
    assert high[1] == pytest.approx((1000 - 40) / std)
    assert (low[2:].sum(), middle[2:].sum(), high[2:].sum()) == (0, 3, 7)
    assert known.all()


def test_a_phenotype_sets_its_ancestors_to_their_information_content_and_an_excluded_one_only_itself() -> None:
    train = [record(None, ARACHNODACTYLY), record(None, ECTOPIA_LENTIS, f"!{ARACHNODACTYLY}"), record(None, FACE_TERM)]
    encoder = PhenotypeEncoder.fit(train)
    assert encoder.observed[ARACHNODACTYLY] == pytest.approx(-math.log(1 / 4))
    assert encoder.observed[ROOT] == pytest.approx(-math.log(3 / 4))
    assert set(encoder.excluded) == {ARACHNODACTYLY}
    row = encoder.transform([encoder.columns(record(None, ARACHNODACTYLY))]).toarray()[0]
    named = dict(zip([*encoder.observed, *(f"!{term}" for term in encoder.excluded)], row, strict=True))
    assert np.linalg.norm(row) == pytest.approx(ROW_NORM)
    assert named[ARACHNODACTYLY] / named[ROOT] == pytest.approx(math.log(1 / 4) / math.log(3 / 4))
    assert named[f"!{ARACHNODACTYLY}"] == named[FACE_TERM] == 0
    only_excluded = encoder.transform([encoder.columns(record(None, f"!{ARACHNODACTYLY}"))]).toarray()[0]
    assert np.flatnonzero(only_excluded).tolist() == [encoder.size - 1]
    assert only_excluded[-1] < 0


def test_encoders_survive_json() -> None:
    train = [record({"age": "P3Y", "sex": "F"}, ARACHNODACTYLY), record({"age": "P9Y", "sex": "F"}, f"!{FACE_TERM}")]
    fields = FieldsEncoder.fit({"age": "duration", "sex": "category"}, train)
    assert FieldsEncoder.from_json(fields.to_json()) == fields
    phenotypes = PhenotypeEncoder.fit(train)
    assert PhenotypeEncoder.from_json(phenotypes.to_json()) == phenotypes
