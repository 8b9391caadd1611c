from __future__ import annotations

import math

import numpy as np
import pytest

from mint_ray.records import Phenotype, Record
from mint_ray.teachers.fusion.tabular import LENGTH, FieldsCode, FindingsCode, read_field

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
def test_a_field_is_a_word_or_a_finite_number_or_not_there(text: str, kind: str, expected: object) -> None:
    found = read_field(record({"x": text}), "x", kind)
    assert found == (pytest.approx(expected) if isinstance(expected, float) else expected)


def test_words_of_two_training_records_are_known_and_all_others_share_a_place() -> None:
    train = [record({"sex": sex}) for sex in ("F", "F", "M", "M", "X")]
    code = FieldsCode.learn({"sex": "category"}, train)
    rows, known = code.write([record({"sex": "M"}), record({"sex": "X"}), record({"sex": "?"}), record()])
    assert rows.tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 1], [0, 0, 0]]
    assert known.tolist() == [True, True, True, False]


def test_a_number_is_in_standard_deviations_from_the_mean_and_steps_over_the_quantiles_of_the_training_split() -> None:
    code = FieldsCode.learn({"age": "number"}, [record({"age": str(age)}) for age in range(0, 90, 10)])
    (low, middle, high), known = code.write([record({"age": age}) for age in ("-1", "40", "1000")])
    deviation = np.std(np.arange(0, 90, 10))
    assert middle[:2].tolist() == pytest.approx([1, 0])
    assert high[1] == pytest.approx((1000 - 40) / deviation)
    assert (low[2:].sum(), middle[2:].sum(), high[2:].sum()) == (0, 3, 7)
    assert known.all()


def test_a_finding_fills_all_that_it_is_a_kind_of_by_information_content_and_an_excluded_one_itself() -> None:
    train = [record(None, ARACHNODACTYLY), record(None, ECTOPIA_LENTIS, f"!{ARACHNODACTYLY}"), record(None, FACE_TERM)]
    code = FindingsCode.learn(train)
    assert code.observed[ARACHNODACTYLY] == pytest.approx(-math.log(1 / 4))
    assert code.observed[ROOT] == pytest.approx(-math.log(3 / 4))
    assert set(code.excluded) == {ARACHNODACTYLY}
    row = code.write([code.places(record(None, ARACHNODACTYLY))]).toarray()[0]
    named = dict(zip([*code.observed, *(f"!{term}" for term in code.excluded)], row, strict=True))
    assert np.linalg.norm(row) == pytest.approx(LENGTH)
    assert named[ARACHNODACTYLY] / named[ROOT] == pytest.approx(math.log(1 / 4) / math.log(3 / 4))
    assert named[f"!{ARACHNODACTYLY}"] == named[FACE_TERM] == 0
    only_excluded = code.write([code.places(record(None, f"!{ARACHNODACTYLY}"))]).toarray()[0]
    assert np.flatnonzero(only_excluded).tolist() == [code.width - 1]
    assert only_excluded[-1] < 0


def test_codes_survive_json() -> None:
    train = [record({"age": "P3Y", "sex": "F"}, ARACHNODACTYLY), record({"age": "P9Y", "sex": "F"}, f"!{FACE_TERM}")]
    fields = FieldsCode.learn({"age": "duration", "sex": "category"}, train)
    assert FieldsCode.from_json(fields.to_json()) == fields
    findings = FindingsCode.learn(train)
    assert FindingsCode.from_json(findings.to_json()) == findings
