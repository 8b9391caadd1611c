"""Paired tests against enumerated exchanges, a normal approximation and worked examples."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from scipy import stats

from mint_ray.metrics import Resampling, adjust_holm, compare_pair, permutation_p
from mint_ray.metrics.paired import MAX_EXACT_GROUPS
from mint_ray.records import Prediction


def answers(right: str, wrong: str) -> list[Prediction]:
    """Return one answer for each letter of `right` and `wrong`, which are the record ids."""
    return [
        Prediction(record_id=key, student="aligned", labels=["a" if key in right else "b"], text="")
        for key in sorted(right + wrong)
    ]


def test_three_differences_equal_a_hand_enumeration() -> None:
    # of the eight exchanges two reach the sum of six: none and all
    assert permutation_p([1.0, 2.0, 3.0]) == 2 / 8
    # 1 + 2 - 3 = 0 is reached by every exchange
    assert permutation_p([1.0, 2.0, -3.0]) == 1
    assert permutation_p([]) == 1
    assert permutation_p([2.0]) == 1
    assert permutation_p([0.0, 0.0]) == 1


@pytest.mark.parametrize("seed", range(4))
def test_few_groups_give_the_exact_p(seed: int) -> None:
    differences = np.random.default_rng(seed).normal(0.4, 1, size=9)
    sums = [np.dot(signs, differences) for signs in itertools.product((1, -1), repeat=9)]
    expected = np.mean([abs(value) >= abs(differences.sum()) - 1e-12 for value in sums])
    assert permutation_p(differences) == pytest.approx(expected)


def test_sums_that_are_equal_up_to_rounding_are_ties() -> None:
    # 0.1 + 0.2 - 0.3 is 5.6e-17 in floating point, and every exchange is as extreme as 0
    assert permutation_p([0.1, 0.2, -0.3]) == 1


def test_the_largest_exact_test_enumerates_all_exchanges() -> None:
    assert permutation_p(np.ones(MAX_EXACT_GROUPS), permutations=10) == 2 / 2**MAX_EXACT_GROUPS


def test_drawn_permutations_are_repeatable() -> None:
    differences = np.random.default_rng(2).normal(0.1, 1, size=40)
    values = [permutation_p(differences, permutations=500, seed=seed) for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def test_the_p_of_many_groups_is_close_to_the_exact_one_and_never_zero() -> None:
    rng = np.random.default_rng(1)
    differences = rng.normal(0.25, 1, size=60)
    # with sixty groups the sum is approximately normal under random exchanges
    expected = 2 * stats.norm.sf(abs(differences.sum()) / np.sqrt((differences**2).sum()))
    assert len(differences) > MAX_EXACT_GROUPS
    assert permutation_p(differences) == pytest.approx(expected, abs=0.01)
    assert permutation_p(np.ones(200)) == 1 / 10_001


def test_groups_without_a_difference_do_not_count() -> None:
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


def test_equal_methods_have_no_difference() -> None:
    truth, group = dict.fromkeys("abc", "a"), {key: key for key in "abc"}
    found = compare_pair(
        [answers("a", "bc")], [answers("a", "bc")], metric="mean_reciprocal_rank", top=1, truth=truth, group=group
    )
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_the_interval_is_that_of_paired_records() -> None:
    rng = random.Random(0)
    keys = [f"{number:03d}" for number in range(400)]

    def draw(share: float) -> list[Prediction]:
        return [
            Prediction(record_id=key, student="aligned", labels=["a" if rng.random() < share else "b"], text="")
            for key in keys
        ]

    first, second = draw(0.6), draw(0.4)
    truth, group = dict.fromkeys(keys, "a"), {key: key for key in keys}
    found = compare_pair(
        [first],
        [second],
        metric="top_1_accuracy",
        top=1,
        truth=truth,
        group=group,
        resampling=Resampling(resamples=3000),
    )
    each = np.array([float(x.labels == ["a"]) - float(y.labels == ["a"]) for x, y in zip(first, second, strict=True)])
    half = 1.96 * each.std() / np.sqrt(400)
    assert found.value == pytest.approx(each.mean())
    assert found.low == pytest.approx(each.mean() - half, abs=0.01)
    assert found.high == pytest.approx(each.mean() + half, abs=0.01)


def test_a_metric_that_is_not_a_mean_over_records_is_refused() -> None:
    truth, group = {"a": "a"}, {"a": "a"}
    with pytest.raises(ValueError, match="got 'car'"):
        compare_pair([answers("a", "")], [answers("a", "")], metric="car", top=1, truth=truth, group=group)


def test_holm_equals_a_worked_example() -> None:
    # 4 x 0.01, 3 x 0.02, 2 x 0.03, and 0.04 raised to the largest value before it
    assert adjust_holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert adjust_holm([0.01, 0.5, 0.9]) == pytest.approx([0.03, 1.0, 1.0])
    assert adjust_holm([]) == []


def test_holm_rejects_the_same_as_the_stepwise_procedure() -> None:
    rng = random.Random(3)
    for _ in range(50):
        values = [rng.random() ** 3 for _ in range(7)]
        adjusted = adjust_holm(values)
        # the definition: reject in order of p while p <= level / (number of remaining tests)
        order, rejected = sorted(range(7), key=values.__getitem__), set()
        for rank, index in enumerate(order):
            if values[index] > 0.05 / (7 - rank):
                break
            rejected.add(index)
        assert {index for index, p in enumerate(adjusted) if p <= 0.05} == rejected


def test_a_ranking_is_truncated_to_the_list_length() -> None:
    ranking = Prediction(record_id="a", student="aligned", labels=["b", "c", "a"], text="", scores=[0.5, 0.3, 0.2])
    silent = Prediction(record_id="a", student="aligned", labels=[], text="", reason="empty")

    def found(top: int) -> float:
        return compare_pair(
            [[ranking]], [[silent]], metric="top_k_accuracy", top=top, truth={"a": "a"}, group={"a": "a"}
        ).value

    assert (found(2), found(3)) == (0, 1)
