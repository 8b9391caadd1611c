"""Estimates, paired tests and confusions of a comparison."""

from __future__ import annotations

import dataclasses

import pytest

from mint_ray.compare.statistics import MethodRuns, Statistics
from mint_ray.records import Method
from tests.compare.runs import ALIGNED, BASE, IDS, LABELS, RECORDS, TEST, config, predictions

RANKINGS = {record.record_id: [record.label_id or "", *IDS] for record in TEST}


@pytest.fixture(scope="module")
def statistics() -> Statistics:
    settings = {"pair": {"sampler": {"kind": "hard", "top": 2}}, "evaluate": {"resamples": 100}}
    return Statistics(config({"m": {}}, **settings), LABELS, RECORDS)


def row(name: str | None, method: Method, *num_right: int) -> MethodRuns:
    return MethodRuns(name=name, method=method, runs=[predictions(method, count) for count in num_right])


def test_estimates_are_means_over_runs(statistics: Statistics) -> None:
    found = statistics.estimate(row("orpo", ALIGNED, 7, 5).runs, RANKINGS)
    assert found["estimates"]["top_1_accuracy"].value == 6 / 8
    assert found["unparsed"] == {"no_list": 2}
    # records 0, 2, 4, 6 are female: 4 right in one run, 3 in the other
    assert found["subgroups"]["female"].value == 3.5 / 4


def test_only_rows_that_answer_in_the_same_way_are_tested(statistics: Statistics) -> None:
    ranked = Method(student="aligned", mode="rank")
    rows = [row(None, BASE, 0), row("orpo", ALIGNED, 7), row("orpo", ranked, 7), row("sft", ALIGNED, 3)]
    tests = statistics.compare(rows, "top_1_accuracy", None)
    assert [(test.first, test.second) for test in tests] == [
        ("orpo/free", "base"), ("sft/free", "base"), ("sft/free", "orpo/free")
    ]  # fmt: skip


def test_a_reference_is_tested_against_every_other_row(statistics: Statistics) -> None:
    rows = [row(None, BASE, 0), row("sft", ALIGNED, 3), row("orpo", ALIGNED, 7)]
    tests = statistics.compare(rows, "top_1_accuracy", "orpo")
    assert [(test.first, test.second) for test in tests] == [("orpo/free", "base"), ("orpo/free", "sft/free")]
    assert [test.difference.value for test in tests] == pytest.approx([7 / 8, 4 / 8])
    assert all(test.adjusted_p >= test.difference.p for test in tests)


def test_methods_named_like_teacher_and_base_student_stay_rows_of_their_own(statistics: Statistics) -> None:
    rows = [row(None, BASE, 0), row("base", ALIGNED, 3), row("base student", ALIGNED, 7)]
    assert len({each.key for each in rows}) == 3
    tests = statistics.compare(rows, "top_1_accuracy", "base student")
    assert [test.second for test in tests] == ["base", "base/free"]


def test_confusions_are_counted_per_row_and_averaged_over_runs(statistics: Statistics) -> None:
    [first, *_] = statistics.confusions([row("orpo", ALIGNED, 7, 5), row("sft", ALIGNED, 3)])
    assert first.predicted == "Disease 7"
    # records 3 and 7 have the label 4; the answer to record 7 is not parsed
    counts = {each.truth: each.counts for each in statistics.confusions([row("orpo", ALIGNED, 3, 4)])}
    assert counts["Disease 4"] == {"orpo/free": 0.5}


def test_a_row_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        row("orpo", ALIGNED, 1).name = "sft"  # type: ignore[misc]
