from __future__ import annotations

import math

import pytest

from mint_ray.retrievers.adaptive import confidence, keep_rising


def test_confidence_is_the_log_share_of_the_best_candidate() -> None:
    assert confidence([math.log(0.02), math.log(0.06), math.log(0.02)]) == pytest.approx(math.log(0.6))
    assert confidence([-1000.0, -1000.0]) == pytest.approx(math.log(0.5))
    assert confidence([-3.0]) == 0.0


def test_what_all_candidates_share_counts_for_nothing() -> None:
    assert confidence([-3.0, -2.0, -7.0]) == pytest.approx(confidence([-503.0, -502.0, -507.0]))


def test_a_passage_joins_only_if_confidence_rises_over_what_has_joined() -> None:
    known = {"": -2.0, "a": -1.0, "ab": -1.5, "ac": -0.5, "acd": -0.5}
    kept, tried = keep_rising("abcd", lambda passages: known["".join(passages)])
    assert kept == ["a", "c"]  # b made it less sure, d no surer
    assert tried == [-2.0, -1.0, -1.5, -0.5, -0.5]


def test_none_join_where_none_helps() -> None:
    kept, tried = keep_rising("ab", lambda passages: -float(len(passages)))
    assert kept == []
    assert tried == [0.0, -1.0, -1.0]
    assert keep_rising("", lambda passages: -1.0) == ([], [-1.0])
