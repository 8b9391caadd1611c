"""List lengths, the place of the true label, and weighted sampling, which all samplers share."""

from __future__ import annotations

import random
from collections import Counter
from itertools import permutations
from math import log

import pytest

from mint_ray.config.loader import UserError
from mint_ray.samplers import Hard, Permuted, TopBottom
from mint_ray.samplers.base import chunks, sample_without_replacement
from tests.samplers.conformance import SCORES


def test_the_true_label_comes_first_only_on_request() -> None:
    assert Hard(top=2).draw(SCORES, "L2") == [(["L0", "L1"], ["L2", "L3"])]
    assert Hard(top=2, truth_first=True).draw(SCORES, "L2") == [(["L2", "L0"], ["L1", "L3"])]


def test_lists_that_the_labels_cannot_fill_are_not_drawn() -> None:
    assert Hard(top=7).draw(SCORES, None) == []
    assert len(Hard(top=3, pairs_per_record=5).draw(SCORES, None)) == 3


def test_bottom_defaults_to_top() -> None:
    assert (Hard(top=4).num_rejected, Hard(top=4).min_labels) == (4, 8)
    assert (TopBottom(top=2, bottom=3).num_rejected, TopBottom(top=2, bottom=3).min_labels) == (3, 5)


def test_a_task_with_too_few_labels_is_refused() -> None:
    with pytest.raises(UserError, match="top 5 and bottom 5 need more labels than the task's 9"):
        Hard(top=5).check_num_labels(9)
    Hard(top=5).check_num_labels(10)
    Permuted(top=8).check_num_labels(8)


@pytest.mark.parametrize("sizes", [{"top": 0}, {"bottom": 0}, {"pairs_per_record": 0}])
def test_sizes_must_be_positive(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be positive, got"):
        Hard(**sizes)


def test_chunks_are_consecutive_and_the_last_may_be_shorter() -> None:
    assert list(chunks(list("abcde"), 2)) == [["a", "b"], ["c", "d"], ["e"]]


def test_labels_are_drawn_in_proportion_to_their_weights() -> None:
    rng = random.Random(0)
    weights = {"a": 1, "b": 2, "c": 3}
    log_weights = [log(weight) for weight in weights.values()]
    drawn = Counter(tuple(sample_without_replacement(list(weights), log_weights, 2, rng)) for _ in range(20_000))
    for first, second in permutations(weights, 2):
        expected = weights[first] / 6 * weights[second] / (6 - weights[first])
        assert drawn[first, second] / 20_000 == pytest.approx(expected, abs=0.015)
