"""The sampler that uses the true label and no teacher."""

from __future__ import annotations

import dataclasses
from collections import Counter

from mint_ray.samplers import Truth
from tests.samplers.conformance import LABELS, SCORES


def test_pairs_do_not_depend_on_the_teacher() -> None:
    sampler = Truth(top=3, bottom=2, seed=4)
    [(chosen, rejected)] = sampler.draw(SCORES, LABELS[5])
    assert chosen[0] == LABELS[5]
    assert (len(chosen), len(rejected), len({*chosen, *rejected})) == (3, 2, 5)
    reversed_scores = dataclasses.replace(SCORES, labels=SCORES.labels[::-1])
    assert sampler.draw(reversed_scores, LABELS[5]) == [(chosen, rejected)]
    others = [dataclasses.replace(sampler, seed=seed).draw(SCORES, LABELS[5]) for seed in (5, 6)]
    assert any(pairs != [(chosen, rejected)] for pairs in others)


def test_there_is_no_pair_without_a_known_label_or_with_too_few_labels() -> None:
    assert Truth(top=3).draw(SCORES, None) == []
    few = dataclasses.replace(SCORES, labels=LABELS[:5], scores=SCORES.scores[:5])
    assert Truth(top=3).draw(few, LABELS[0]) == []


def test_labels_behind_the_true_one_are_drawn_uniformly() -> None:
    counts = Counter(
        label
        for number in range(1100)
        for chosen, _ in Truth(top=2).draw(dataclasses.replace(SCORES, record_id=f"r{number}"), LABELS[0])
        for label in chosen[1:]
    )
    assert set(counts) == set(LABELS[1:])
    # eleven labels, a hundred draws each: four standard deviations are 38
    assert all(abs(count - 100) < 40 for count in counts.values())
