"""Every sampler conforms to the interface; a new one joins `SAMPLERS`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal, get_args

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from mint_ray.config.loader import settings
from mint_ray.records import TeacherScores
from mint_ray.samplers import (
    AnySampler,
    Confusion,
    Hard,
    Margin,
    Mixture,
    MixtureMember,
    OnPolicy,
    Permuted,
    Sampler,
    SamplerContext,
    Sibling,
    TopBottom,
    Truth,
    Uniform,
)
from tests.samplers.conformance import LABELS, SCORES, check_pairs, check_sampler

AFFINITIES = {label: {other: float(place + 1) for place, other in enumerate(LABELS[::3])} for label in LABELS[::2]}
RANKINGS = {str(digit): LABELS[digit:] + LABELS[:digit] for digit in range(10)}
CONTEXT = SamplerContext(confusions=AFFINITIES, siblings=AFFINITIES, student_rankings={None: RANKINGS})


@settings
class EveryOther(Sampler):
    """Sampler of every other rank below the chosen ones: the example of the README."""

    kind: Literal["every_other"] = "every_other"

    def iter_rejected(
        self, chosen: list[str], remaining: list[str], scores: TeacherScores, context: SamplerContext
    ) -> Iterator[list[str]]:
        """Yield the even ranks of the remaining ones, then the odd ones."""
        yield remaining[::2][: self.num_rejected]
        yield remaining[1::2][: self.num_rejected]


SAMPLERS = [
    TopBottom(),
    Hard(),
    Margin(),
    Uniform(),
    Uniform(temperature=0.1),
    Confusion(),
    Confusion(top=2, temperature=0.5),
    Sibling(),
    Sibling(bottom=2, temperature=2.0),
    Mixture(
        members=(
            MixtureMember(sampler=Hard()),
            MixtureMember(sampler=Confusion(temperature=0.5), weight=2),
            MixtureMember(sampler=Uniform()),
            MixtureMember(sampler=OnPolicy()),
        )
    ),
    OnPolicy(),
    OnPolicy(student_top_k=3),
    Permuted(),
    Truth(),
    EveryOther(),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.kind)
def test_it_conforms(sampler: Sampler) -> None:
    check_sampler(sampler, CONTEXT)


@hypothesis_settings(deadline=None)
@given(
    sampler=st.sampled_from(SAMPLERS),
    record_id=st.one_of(st.text(max_size=4), st.sampled_from("0123456789")),
    top=st.integers(1, 8),
    pairs_per_record=st.integers(1, 4),
    truth=st.sampled_from([None, *LABELS]),
    truth_first=st.booleans(),
    values=st.lists(st.integers(-5, 5), min_size=12, max_size=12),
)
def test_pairs_of_any_record_conform(
    sampler: Sampler,
    record_id: str,
    top: int,
    pairs_per_record: int,
    truth: str | None,
    truth_first: bool,
    values: list[int],
) -> None:
    top += isinstance(sampler, Permuted)
    sampler = dataclasses.replace(sampler, top=top, pairs_per_record=pairs_per_record, truth_first=truth_first)
    scores = dataclasses.replace(SCORES, record_id=record_id, scores=sorted(map(float, values), reverse=True))
    check_pairs(sampler, scores, truth, CONTEXT)
    if truth and isinstance(sampler, Truth):
        assert all(chosen[0] == truth for chosen, _ in sampler.draw(scores, truth, CONTEXT))


def test_all_members_are_tested_and_read_from_their_settings() -> None:
    members = get_args(get_args(AnySampler)[0])
    assert set(members) == {type(sampler) for sampler in SAMPLERS} - {EveryOther}
    adapter = TypeAdapter(AnySampler)
    for sampler in SAMPLERS:
        if not isinstance(sampler, EveryOther):
            assert adapter.validate_python(adapter.dump_python(sampler)) == sampler
