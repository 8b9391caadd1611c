"""Paired tests against scipy, against all exchanges gone through by hand, and against worked examples."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy import stats

from mint_ray.metrics import adjust_holm, compare_pair, permutation_p
from mint_ray.metrics.paired import EXACT_GROUPS
from mint_ray.records import Prediction


def answers(right: str, wrong: str) -> list[Prediction]:
    """Records named by a letter each, answered rightly or wrongly."""
    return [
        Prediction(record_id=key, method="m", labels=["a" if key in right else "b"], text="")
        for key in sorted(right + wrong)
    ]


def test_three_differences_of_one_sign_are_gone_through_by_hand() -> None:
    # of the eight exchanges only none and all of them reach the sum of six
    assert permutation_p([1.0, 2.0, 3.0]) == 2 / 8
    # 1 + 2 - 3 = 0 is reached by every exchange
    assert permutation_p([1.0, 2.0, -3.0]) == 1
    assert permutation_p([]) == 1
    assert permutation_p([0.0, 0.0]) == 1


@pytest.mark.parametrize("seed", range(4))
def test_few_groups_give_the_exact_p_of_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    differences = rng.normal(0.4, 1, size=9)
    reference = stats.permutation_test(
        (differences, np.zeros(9)),
        lambda x, y, axis: np.sum(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
    )
    assert permutation_p(differences) == pytest.approx(reference.pvalue)


def test_many_groups_are_drawn_close_to_the_exact_p_and_never_give_zero() -> None:
    rng = np.random.default_rng(1)
    differences = rng.normal(0.25, 1, size=60)
    # with sixty groups the sum is all but normal under the exchanges
    expected = 2 * stats.norm.sf(abs(differences.sum()) / np.sqrt((differences**2).sum()))
    assert len(differences) > EXACT_GROUPS
    assert permutation_p(differences) == pytest.approx(expected, abs=0.01)
    assert permutation_p(np.ones(200)) == 1 / 10_001


def test_groups_that_do_not_differ_say_nothing() -> None:
    assert permutation_p([1.0, 2.0, 3.0, *[0.0] * 50]) == 2 / 8


def test_records_of_one_group_are_exchanged_together() -> None:
    first, second = answers("abcdef", ""), answers("", "abcdef")
    truth = dict.fromkeys("abcdef", "a")
    alone = compare_pair(
        [first], [second], metric="top_1_accuracy", top=1, truth=truth, group={key: key for key in truth}
    )
    assert (alone.value, alone.p) == (1, 2 / 2**6)
    halves = {key: "g" if key in "abc" else "h" for key in truth}
    together = compare_pair([first], [second], metric="top_1_accuracy", top=1, truth=truth, group=halves)
    assert (together.value, together.p) == (1, 2 / 2**2)


def test_runs_are_averaged_before_they_are_tested() -> None:
    truth, group = dict.fromkeys("ab", "a"), {"a": "a", "b": "b"}
    found = compare_pair(
        [answers("ab", ""), answers("a", "b")],
        [answers("", "ab")],
        metric="top_1_accuracy",
        top=1,
        truth=truth,
        group=group,
    )
    # 1 for the first record, 1/2 for the second
    assert found.value == 0.75
    assert found.p == 2 / 4
    assert found.low <= 0.75 <= found.high


def test_equal_methods_differ_by_nothing() -> None:
    truth, group = dict.fromkeys("abc", "a"), {key: key for key in "abc"}
    found = compare_pair(
        [answers("a", "bc")], [answers("a", "bc")], metric="mean_reciprocal_rank", top=1, truth=truth, group=group
    )
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_the_interval_of_a_difference_is_that_of_paired_records() -> None:
    chance = random.Random(0)
    keys = [f"{number:03d}" for number in range(400)]

    def draw(share: float) -> list[Prediction]:
        return [
            Prediction(record_id=key, method="m", labels=["a" if chance.random() < share else "b"], text="")
            for key in keys
        ]

    first, second = draw(0.6), draw(0.4)
    truth, group = dict.fromkeys(keys, "a"), {key: key for key in keys}
    found = compare_pair([first], [second], metric="top_1_accuracy", top=1, truth=truth, group=group, resamples=3000)
    each = np.array([float(x.labels == ["a"]) - float(y.labels == ["a"]) for x, y in zip(first, second, strict=True)])
    half = 1.96 * each.std() / np.sqrt(400)
    assert found.value == pytest.approx(each.mean())
    assert found.low == pytest.approx(each.mean() - half, abs=0.01)
    assert found.high == pytest.approx(each.mean() + half, abs=0.01)


def test_a_metric_that_is_no_mean_over_records_is_refused() -> None:
    truth, group = {"a": "a"}, {"a": "a"}
    with pytest.raises(ValueError, match="got 'car'"):
        compare_pair([answers("a", "")], [answers("a", "")], metric="car", top=1, truth=truth, group=group)


def test_holm_equals_a_worked_example() -> None:
    # 4 x 0.01, 3 x 0.02, 2 x 0.03 (not below the one before), 1 x 0.04 (raised to it)
    assert adjust_holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert adjust_holm([0.01, 0.5, 0.9]) == pytest.approx([0.03, 1.0, 1.0])
    assert adjust_holm([]) == []


def test_holm_finds_what_the_stepwise_procedure_finds() -> None:
    chance = random.Random(3)
    for _ in range(50):
        values = [chance.random() ** 3 for _ in range(7)]
        adjusted = adjust_holm(values)
        # the definition: reject in order of p as long as p <= level / (tests that are left)
        order, found = sorted(range(7), key=values.__getitem__), set()
        for rank, index in enumerate(order):
            if values[index] > 0.05 / (7 - rank):
                break
            found.add(index)
        assert {index for index, p in enumerate(adjusted) if p <= 0.05} == found


def test_a_ranking_is_tested_by_a_list_as_long_as_anyones() -> None:
    ranking = Prediction(record_id="a", method="m", labels=["b", "c", "a"], text="", scores=[0.5, 0.3, 0.2])
    silent = Prediction(record_id="a", method="m", labels=[], text="", reason="empty")

    def found(top: int) -> float:
        return compare_pair(
            [[ranking]], [[silent]], metric="top_10_accuracy", top=top, truth={"a": "a"}, group={"a": "a"}
        ).value

    assert (found(2), found(3)) == (0, 1)
