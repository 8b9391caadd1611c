"""Rows of rankings and of failed records."""

from __future__ import annotations

import numpy as np

from mint_ray.teachers.rankings import failed_ranking, rank_labels
from tests.teachers.conformance import make_record


def test_labels_are_ranked_by_score_and_equal_scores_keep_their_order() -> None:
    row = rank_labels(make_record(1, split="test"), "toy", ["a", "b", "c", "d"], np.array([1.0, 2.0, 1.0, 2.0]))
    assert (row.record_id, row.split, row.teacher, row.status) == ("r1", "test", "toy", "ok")
    assert (row.labels, row.scores) == (["b", "d", "a", "c"], [2.0, 2.0, 1.0, 1.0])


def test_a_failed_record_keeps_its_reason_and_no_labels() -> None:
    row = failed_ranking(make_record(1), "toy", "no_input")
    assert (row.status, row.reason, row.labels, row.scores) == ("failed", "no_input", [], [])
