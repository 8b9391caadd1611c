"""Confusion and sibling samplers, by hand-counted affinities."""

from __future__ import annotations

import pytest

from mint_ray.records import TeacherScores
from mint_ray.samplers import Confusion, SamplerContext, Sibling, count_confusions, to_affinity_matrix

LABELS = list("abcdefgh")


def ranking(record_id: str, labels: str) -> TeacherScores:
    return TeacherScores(
        record_id=record_id, split="validation", teacher="t", labels=list(labels),
        scores=[float(-rank) for rank in range(len(labels))],
    )  # fmt: skip


SCORES = ranking("r", "abcdefgh")


def test_confusions_are_counted_within_the_list_and_between_different_labels() -> None:
    rows = [ranking("1", "abcd"), ranking("2", "bacd"), ranking("3", "cbda"), ranking("4", "dcba")]
    # the third does not have its own label in the list; the fourth has none
    counts = count_confusions(rows, ["a", "a", "a", None], top=2)
    assert counts == {("a", "b"): 3, ("a", "c"): 1}


def test_affinities_are_symmetric() -> None:
    matrix = to_affinity_matrix({("a", "b"): 3, ("b", "a"): 1, ("c", "a"): 2})
    assert matrix == {"a": {"b": 4, "c": 2}, "b": {"a": 4}, "c": {"a": 2}}


@pytest.mark.parametrize("kind", [Confusion, Sibling])
def test_the_largest_sums_of_affinity_are_rejected_first_in_the_teachers_order(
    kind: type[Confusion],
) -> None:
    # over a and b: c 1, e 2 + 2, g 3, and b itself is chosen
    context = SamplerContext(
        confusions={"a": {"e": 2, "c": 1, "b": 9}, "b": {"e": 2, "g": 3}, "h": {"d": 9}} if kind is Confusion else {},
        siblings={"a": {"e": 2, "c": 1, "b": 9}, "b": {"e": 2, "g": 3}, "h": {"d": 9}} if kind is Sibling else {},
    )
    drawn = kind(top=2, pairs_per_record=4).draw(SCORES, None, context)
    # e 4 and g 3, then c 1 and the best label of affinity 0
    assert [rejected for _, rejected in drawn] == [["e", "g"], ["c", "d"], ["f", "h"]]
    assert kind(top=2).draw(SCORES, None) == [(["a", "b"], ["c", "d"])]


def test_temperature_one_draws_in_proportion_to_the_affinity() -> None:
    context = SamplerContext(confusions={"a": {"c": 3.0, "g": 1.0}})
    sampler = Confusion(top=1, temperature=1.0)
    drawn = [sampler.draw(ranking(str(number), "abcdefgh"), None, context)[0][1] for number in range(4_000)]
    assert sum(rejected == ["c"] for rejected in drawn) / 4_000 == pytest.approx(0.75, abs=0.03)
    assert sum(rejected == ["g"] for rejected in drawn) / 4_000 == pytest.approx(0.25, abs=0.03)


def test_labels_of_affinity_zero_fill_up_the_list() -> None:
    context = SamplerContext(confusions={"a": {"g": 1.0}})
    [(_, rejected)] = Confusion(top=1, bottom=3, temperature=0.5).draw(SCORES, None, context)
    assert rejected == ["b", "c", "g"]


def test_a_negative_temperature_is_refused() -> None:
    with pytest.raises(ValueError, match=r"temperature must not be negative, got -0\.1"):
        Sibling(temperature=-0.1)
