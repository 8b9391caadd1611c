from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mint_ray.records import TeacherScores
from mint_ray.samplers import Hard, Margin, TopBottom, Uniform

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


@given(
    kind=st.sampled_from([TopBottom, Hard, Margin, Uniform]),
    top=st.integers(1, 8),
    pairs=st.integers(1, 4),
    truth=st.sampled_from([None, *LABELS]),
    first=st.booleans(),
)
def test_lists_are_disjoint_of_equal_length_and_of_the_task(
    kind: type[Hard], top: int, pairs: int, truth: str | None, first: bool
) -> None:
    drawn = kind(top=top, pairs_per_record=pairs, truth_first=first).draw(SCORES, truth)
    assert len(drawn) <= pairs
    for chosen, rejected in drawn:
        assert len(chosen) == len(rejected) == top
        assert len(set(chosen + rejected)) == 2 * top
        assert set(chosen + rejected) <= set(LABELS)
        if first and truth:
            assert chosen[0] == truth
