from __future__ import annotations

import dataclasses
import random
from collections import Counter
from itertools import permutations
from math import log

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mint_ray.records import TeacherScores
from mint_ray.samplers import (
    Confusion,
    Hard,
    Knowledge,
    Margin,
    Mixture,
    OnPolicy,
    Permuted,
    Sampler,
    Share,
    Sibling,
    TopBottom,
    Truth,
    Uniform,
    difficulty,
)
from mint_ray.samplers.lists import draw_by_odds

LABELS = [f"L{i}" for i in range(12)]
SCORES = TeacherScores(
    record_id="r", split="train", teacher="t", labels=LABELS, scores=[1.0 - i / 11 for i in range(12)]
)


def test_top_bottom_rejects_the_last_ranks() -> None:
    assert TopBottom(top=2, bottom=3).draw(SCORES, None) == [(LABELS[:2], LABELS[-3:])]


def test_hard_rejects_the_ranks_below_the_cut() -> None:
    assert Hard(top=2, pairs_per_record=2).draw(SCORES, None) == [(LABELS[:2], LABELS[2:4]), (LABELS[:2], LABELS[4:6])]


def test_margin_leaves_a_gap_of_its_size() -> None:
    [(chosen, rejected)] = Margin(top=2, margin=0.5).draw(SCORES, None)
    assert chosen == LABELS[:2]
    assert rejected == LABELS[7:9]  # rank 1 has 10/11, half the range below it is 4.5/11, and rank 7 has 4/11


def test_margin_that_nothing_meets_draws_nothing() -> None:
    assert Margin(top=6, margin=0.9).draw(SCORES, None) == []


def test_uniform_is_drawn_from_the_record_and_the_seed() -> None:
    drawn = Uniform(top=3).draw(SCORES, None)
    assert drawn == Uniform(top=3).draw(SCORES, None)
    assert any(Uniform(top=3, seed=seed).draw(SCORES, None) != drawn for seed in range(1, 6))


def test_the_truth_comes_first_only_when_asked() -> None:
    assert Hard(top=2).draw(SCORES, "L2") == [(["L0", "L1"], ["L2", "L3"])]
    assert Hard(top=2, truth_first=True).draw(SCORES, "L2") == [(["L2", "L0"], ["L1", "L3"])]


def test_lists_that_the_labels_cannot_fill_are_not_drawn() -> None:
    assert Hard(top=7).draw(SCORES, None) == []
    assert len(Hard(top=3, pairs_per_record=5).draw(SCORES, None)) == 3


@pytest.mark.parametrize("sizes", [{"top": 0}, {"bottom": 0}, {"pairs_per_record": 0}])
def test_sizes_must_be_positive(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be positive, got"):
        Hard(**sizes)


def test_a_low_temperature_draws_the_ranks_below_the_cut_and_a_high_one_any() -> None:
    assert Uniform(top=3, temperature=1e-6).draw(SCORES, None) == Hard(top=3).draw(SCORES, None)

    def mean_rank(temperature: float | None) -> float:
        drawn = [Uniform(top=3, temperature=temperature, seed=seed).draw(SCORES, None) for seed in range(300)]
        ranks = [LABELS.index(label) for [(_, rejected)] in drawn for label in rejected]
        return sum(ranks) / len(ranks)

    # ranks 3 to 11 are 7 on average
    assert mean_rank(None) == pytest.approx(7, abs=0.3)
    assert mean_rank(1e6) == pytest.approx(7, abs=0.3)
    assert mean_rank(0.2) < 6.2


def test_draws_follow_the_odds() -> None:
    rng = random.Random(0)
    odds = {"a": 1, "b": 2, "c": 3}
    drawn = Counter(
        tuple(draw_by_odds(list(odds), [log(value) for value in odds.values()], 2, rng)) for _ in range(20_000)
    )
    for first, second in permutations(odds, 2):
        expected = odds[first] / 6 * odds[second] / (6 - odds[first])
        assert drawn[first, second] / 20_000 == pytest.approx(expected, abs=0.015)


def test_permuted_rejects_the_chosen_labels_in_every_other_order() -> None:
    drawn = Permuted(top=3, pairs_per_record=9).draw(SCORES, None)
    assert {tuple(chosen) for chosen, _ in drawn} == {("L0", "L1", "L2")}
    assert sorted(tuple(rejected) for _, rejected in drawn) == sorted(permutations(LABELS[:3]))[1:]
    assert len({tuple(Permuted(top=4, seed=seed).draw(SCORES, None)[0][1]) for seed in range(30)}) > 10


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"top": 1}, "top must be 2 or more for there to be another order, got 1"),
        ({"top": 3, "bottom": 2}, "bottom must be top or null, for the labels are the same, got 2"),
    ],
)
def test_permuted_needs_an_order(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Permuted(**sizes)


@pytest.mark.parametrize("temperature", [0, -1])
def test_a_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature must be positive, got {temperature}"):
        Uniform(temperature=temperature)


def test_difficulty_is_one_less_the_gap_in_units_of_the_range() -> None:
    scores = TeacherScores(
        record_id="r", split="train", teacher="t", labels=["a", "b", "c", "d", "e"], scores=[9.0, 7.0, 6.0, 2.0, 1.0]
    )
    assert difficulty(scores, ["a", "b"], ["c", "d"]) == pytest.approx(1 - (8 - 4) / 8)
    assert difficulty(scores, ["a"], ["e"]) == 0
    assert difficulty(scores, ["a", "b"], ["b", "a"]) == 1
    # a truth that the teacher scores low
    assert difficulty(scores, ["d"], ["a"]) == 1
    level = TeacherScores(record_id="r", split="train", teacher="t", labels=["a", "b"], scores=[3.0, 3.0])
    assert difficulty(level, ["a"], ["b"]) == 1


TIES = {label: {other: float(place + 1) for place, other in enumerate(LABELS[::3])} for label in LABELS[::2]}
# of the records that hypothesis comes up with, those of one digit are answered
ANSWERS = {None: {str(digit): LABELS[digit:] + LABELS[:digit] for digit in range(10)}}
KNOWLEDGE = Knowledge(confusions=TIES, siblings=TIES, answers=ANSWERS)
MEMBERS = (
    Share(sampler=Hard()),
    Share(sampler=Confusion(temperature=0.5), weight=2),
    Share(sampler=Uniform()),
    Share(sampler=OnPolicy()),
)


@settings(deadline=None)
@given(
    sampler=st.sampled_from(
        [
            TopBottom(),
            Hard(),
            Margin(),
            Uniform(),
            Uniform(temperature=0.1),
            Confusion(),
            Sibling(temperature=2.0),
            Mixture(members=MEMBERS),
            OnPolicy(),
            OnPolicy(within=3),
            Permuted(),
            Truth(),
        ]
    ),
    record_id=st.one_of(st.text(max_size=4), st.sampled_from("0123456789")),
    top=st.integers(1, 8),
    pairs=st.integers(1, 4),
    truth=st.sampled_from([None, *LABELS]),
    first=st.booleans(),
    values=st.lists(st.integers(-5, 5), min_size=12, max_size=12),
)
def test_lists_are_disjoint_of_equal_length_and_of_the_task(
    sampler: Sampler, record_id: str, top: int, pairs: int, truth: str | None, first: bool, values: list[int]
) -> None:
    permuted = isinstance(sampler, Permuted)
    sized = dataclasses.replace(sampler, top=top + permuted, pairs_per_record=pairs, truth_first=first)
    scores = dataclasses.replace(SCORES, record_id=record_id, scores=sorted(map(float, values), reverse=True))
    drawn = sized.draw(scores, truth, KNOWLEDGE)
    assert drawn == sized.draw(scores, truth, KNOWLEDGE)
    assert len(drawn) <= pairs
    assert len({tuple(chosen + rejected) for chosen, rejected in drawn}) == len(drawn)
    for chosen, rejected in drawn:
        assert len(chosen) == len(rejected) == len(set(rejected)) == top + permuted
        assert set(chosen) == set(rejected) if permuted else not set(chosen) & set(rejected)
        assert set(chosen + rejected) <= set(LABELS)
        assert 0 <= difficulty(scores, chosen, rejected) <= 1
        if truth and (first or isinstance(sampler, Truth)):
            assert chosen[0] == truth


def test_the_truth_is_told_without_the_teacher() -> None:
    sampler = Truth(top=3, bottom=2, seed=4)
    [(chosen, rejected)] = sampler.draw(SCORES, LABELS[5])
    assert chosen[0] == LABELS[5]
    assert (len(chosen), len(rejected), len({*chosen, *rejected})) == (3, 2, 5)
    turned = dataclasses.replace(SCORES, labels=SCORES.labels[::-1])
    assert sampler.draw(turned, LABELS[5]) == [(chosen, rejected)], "another ranking changes nothing"
    assert any(
        dataclasses.replace(sampler, seed=seed).draw(SCORES, LABELS[5]) != [(chosen, rejected)] for seed in (5, 6)
    )


def test_without_a_known_truth_or_enough_labels_there_is_no_pair_of_it() -> None:
    assert Truth(top=3).draw(SCORES, None) == []
    few = dataclasses.replace(SCORES, labels=LABELS[:5], scores=SCORES.scores[:5])
    assert Truth(top=3).draw(few, LABELS[0]) == []


def test_what_follows_the_truth_is_drawn_evenly() -> None:
    counts = Counter(
        label
        for number in range(1100)
        for chosen, _ in Truth(top=2).draw(dataclasses.replace(SCORES, record_id=f"r{number}"), LABELS[0])
        for label in chosen[1:]
    )
    assert set(counts) == set(LABELS[1:])
    # eleven labels, a hundred draws each: four standard deviations are 38
    assert all(abs(count - 100) < 40 for count in counts.values())


@pytest.mark.parametrize(
    ("sampler", "at_random"),
    [
        (Hard(), False),
        (TopBottom(), False),
        (Margin(), False),
        (Confusion(), False),
        (Sibling(), False),
        (Confusion(top=2, temperature=0.5), True),
        (Uniform(), True),
        (Permuted(), True),
        (Truth(), True),
        (Mixture(members=MEMBERS), True),
    ],
)
def test_a_sampler_says_whether_its_seed_matters(sampler: Sampler, at_random: bool) -> None:
    assert sampler.draws_at_random == at_random
    drawn = []
    for seed in range(5):
        seeded = dataclasses.replace(sampler, seed=seed)
        drawn.append(
            [seeded.draw(dataclasses.replace(SCORES, record_id=f"{n}"), LABELS[0], KNOWLEDGE) for n in range(9)]
        )
    assert any(pairs != drawn[0] for pairs in drawn) == at_random
