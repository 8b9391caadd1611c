"""Selection of passages by confidence, on confidences written by hand."""

from __future__ import annotations

import math

import pytest

from mint_ray.retrievers.adaptive import confidence, select_passages


def test_confidence_is_the_log_share_of_the_best_candidate() -> None:
    assert confidence([math.log(0.02), math.log(0.06), math.log(0.02)]) == pytest.approx(math.log(0.6))
    assert confidence([-1000.0, -1000.0]) == pytest.approx(math.log(0.5))
    assert confidence([-3.0]) == 0.0


def test_a_common_constant_does_not_matter() -> None:
    assert confidence([-3.0, -2.0, -7.0]) == pytest.approx(confidence([-503.0, -502.0, -507.0]))


def test_a_passage_is_selected_only_if_it_increases_the_confidence() -> None:
    confidences = {"": -2.0, "a": -1.0, "ab": -1.5, "ac": -0.5, "acd": -0.5}
    selected, tried = select_passages("abcd", lambda passages: confidences["".join(passages)])
    assert selected == ["a", "c"]  # b lowers the confidence, d does not change it
    assert tried == [-2.0, -1.0, -1.5, -0.5, -0.5]


def test_no_passage_is_selected_if_none_helps() -> None:
    selected, tried = select_passages("ab", lambda passages: -float(len(passages)))
    assert selected == []
    assert tried == [0.0, -1.0, -1.0]
    assert select_passages("", lambda passages: -1.0) == ([], [-1.0])
