"""Difficulty of pairs, by hand."""

from __future__ import annotations

import pytest

from mint_ray.records import TeacherScores
from mint_ray.samplers import difficulty

SCORES = TeacherScores(
    record_id="r", split="train", teacher="t", labels=["a", "b", "c", "d", "e"], scores=[9.0, 7.0, 6.0, 2.0, 1.0]
)


def test_difficulty_is_one_minus_the_gap_in_units_of_the_range() -> None:
    assert difficulty(SCORES, ["a", "b"], ["c", "d"]) == pytest.approx(1 - (8 - 4) / 8)
    assert difficulty(SCORES, ["a"], ["e"]) == 0


def test_a_pair_that_the_teacher_does_not_prefer_is_the_hardest() -> None:
    assert difficulty(SCORES, ["a", "b"], ["b", "a"]) == 1
    assert difficulty(SCORES, ["d"], ["a"]) == 1
    equal = TeacherScores(record_id="r", split="train", teacher="t", labels=["a", "b"], scores=[3.0, 3.0])
    assert difficulty(equal, ["a"], ["b"]) == 1
