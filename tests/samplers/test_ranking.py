"""Samplers by the teacher's ranking, on a ranking of twelve labels."""

from __future__ import annotations

from itertools import permutations

import pytest

from mint_ray.samplers import Hard, Margin, Permuted, TopBottom, Uniform
from tests.samplers.conformance import LABELS, SCORES


def test_top_bottom_rejects_the_last_ranks() -> None:
    assert TopBottom(top=2, bottom=3).draw(SCORES, None) == [(LABELS[:2], LABELS[-3:])]


def test_hard_rejects_the_ranks_below_the_chosen_ones() -> None:
    assert Hard(top=2, pairs_per_record=2).draw(SCORES, None) == [(LABELS[:2], LABELS[2:4]), (LABELS[:2], LABELS[4:6])]


def test_margin_leaves_a_gap_of_its_size() -> None:
    [(chosen, rejected)] = Margin(top=2, margin=0.5).draw(SCORES, None)
    assert chosen == LABELS[:2]
    assert rejected == LABELS[7:9]  # rank 1 has 10/11, half the range below it is 4.5/11, and rank 7 has 4/11


def test_a_margin_that_no_label_meets_draws_nothing() -> None:
    assert Margin(top=6, margin=0.9).draw(SCORES, None) == []


def test_uniform_draws_depend_on_the_seed() -> None:
    drawn = Uniform(top=3).draw(SCORES, None)
    assert drawn == Uniform(top=3).draw(SCORES, None)
    assert any(Uniform(top=3, seed=seed).draw(SCORES, None) != drawn for seed in range(1, 6))


def test_a_low_temperature_draws_the_next_ranks_and_a_high_one_any() -> None:
    assert Uniform(top=3, temperature=1e-6).draw(SCORES, None) == Hard(top=3).draw(SCORES, None)

    def mean_rank(temperature: float | None) -> float:
        drawn = [Uniform(top=3, temperature=temperature, seed=seed).draw(SCORES, None) for seed in range(300)]
        ranks = [LABELS.index(label) for [(_, rejected)] in drawn for label in rejected]
        return sum(ranks) / len(ranks)

    # the mean of ranks 3 to 11 is 7
    assert mean_rank(None) == pytest.approx(7, abs=0.3)
    assert mean_rank(1e6) == pytest.approx(7, abs=0.3)
    assert mean_rank(0.2) < 6.2


@pytest.mark.parametrize("temperature", [0, -1])
def test_a_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature must be positive, got {temperature}"):
        Uniform(temperature=temperature)


def test_permuted_rejects_the_chosen_labels_in_every_other_order() -> None:
    drawn = Permuted(top=3, pairs_per_record=9).draw(SCORES, None)
    assert {tuple(chosen) for chosen, _ in drawn} == {("L0", "L1", "L2")}
    assert sorted(tuple(rejected) for _, rejected in drawn) == sorted(permutations(LABELS[:3]))[1:]
    assert len({tuple(Permuted(top=4, seed=seed).draw(SCORES, None)[0][1]) for seed in range(30)}) > 10


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"top": 1}, "top must be 2 or more for there to be another order, got 1"),
        ({"top": 3, "bottom": 2}, "bottom must equal top or be null, because both lists have the same labels, got 2"),
    ],
)
def test_permuted_needs_another_order(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Permuted(**sizes)
