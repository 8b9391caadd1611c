"""Mixtures: each record's pairs come from one member, drawn by weight."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mint_ray.config.loader import UserError, dump, from_data
from mint_ray.config.stages import Pair
from mint_ray.records import TeacherScores
from mint_ray.samplers import Confusion, Hard, Mixture, MixtureMember, Permuted, Sibling, TopBottom

LABELS = [f"L{number}" for number in range(8)]
SCORES = TeacherScores(
    record_id="r", split="train", teacher="t", labels=LABELS, scores=[float(-rank) for rank in range(8)]
)
MIXTURE = Mixture(top=2, members=(MixtureMember(sampler=Hard(), weight=3), MixtureMember(sampler=TopBottom())))


def test_members_are_drawn_by_weight_and_use_the_list_lengths_of_the_mixture() -> None:
    drawn = [MIXTURE.draw(dataclasses.replace(SCORES, record_id=str(number)), None) for number in range(2_000)]
    hard, last = ([(LABELS[:2], LABELS[2:4])], [(LABELS[:2], LABELS[6:])])
    assert drawn.count(hard) + drawn.count(last) == 2_000
    assert drawn.count(hard) / 2_000 == pytest.approx(0.75, abs=0.04)
    assert drawn == [MIXTURE.draw(dataclasses.replace(SCORES, record_id=str(n)), None) for n in range(2_000)]


def test_the_member_depends_on_record_and_seed() -> None:
    names = [[dataclasses.replace(MIXTURE, seed=seed).for_record(str(n)).kind for n in range(40)] for seed in (0, 1)]
    assert names[0] != names[1]
    assert set(names[0]) == {"hard", "top_bottom"}


def test_it_requires_what_its_members_require() -> None:
    mixture = Mixture(
        members=(MixtureMember(sampler=Confusion()), MixtureMember(sampler=Sibling()), MixtureMember(sampler=Hard()))
    )
    assert mixture.requires == {"confusions", "siblings"}
    assert MIXTURE.requires == frozenset()


def test_it_needs_the_maximum_of_its_members_label_counts() -> None:
    assert Mixture(top=4, members=(MixtureMember(sampler=Permuted()),)).min_labels == 4
    assert Mixture(top=4, members=(MixtureMember(sampler=Permuted()), MixtureMember(sampler=Hard()))).min_labels == 8


def test_it_survives_dump_and_load() -> None:
    pair = Pair(sampler=MIXTURE)
    assert from_data(Pair, dump(pair)) == pair


HARD: dict[str, Any] = {"sampler": {"kind": "hard"}}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"members": []}, "sampler: members must name at least one sampler, got none"),
        ({}, "sampler.members: required, and not given"),
        ({"members": [HARD | {"weight": 0}]}, "weight must be positive, got 0.0"),
        ({"members": [{"sampler": {"kind": "mixture", "members": [HARD]}}]}, "got 'mixture'"),
        ({"top": 2, "members": [{"sampler": {"kind": "hard", "top": 5}}]}, "top is set by the mixture, to 2; its member hard has 5"),
        ({"top": 1, "members": [{"sampler": {"kind": "permuted"}}]}, "top must be 2 or more"),
        ({"members": [{"sampler": {"kind": "margin", "margin": 2.0}}]}, "margin must lie in 0 to 1, got 2.0"),
    ],
)  # fmt: skip
def test_an_invalid_mixture_is_named(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        from_data(Pair, {"sampler": {"kind": "mixture", **settings}})
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
