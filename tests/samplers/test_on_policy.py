"""The on-policy sampler, on student rankings written by hand."""

from __future__ import annotations

import dataclasses

import pytest

from mint_ray.config.loader import UserError, from_data
from mint_ray.records import TeacherScores
from mint_ray.samplers import Hard, Mixture, MixtureMember, OnPolicy, SamplerContext

LABELS = list("abcdefgh")
SCORES = TeacherScores(
    record_id="r", split="train", teacher="t", labels=LABELS, scores=[float(-rank) for rank in range(8)]
)


def context_of(answers: str, student: str | None = None) -> SamplerContext:
    return SamplerContext(student_rankings={student: {"r": list(answers)}})


def test_the_most_likely_labels_are_rejected_in_the_students_order() -> None:
    sampler = OnPolicy(top=2, pairs_per_record=2)
    drawn = sampler.draw(SCORES, None, context_of("gbheacdf"))
    assert drawn == [(["a", "b"], ["g", "h"]), (["a", "b"], ["e", "c"])]
    assert [sampler.count_fallbacks("r", rejected, context_of("gbheacdf")) for _, rejected in drawn] == [0, 0]


def test_the_true_label_is_never_rejected() -> None:
    assert OnPolicy(top=2).draw(SCORES, "g", context_of("gbheacdf")) == [(["a", "b"], ["h", "e"])]
    assert OnPolicy(top=2, truth_first=True).draw(SCORES, "g", context_of("gbheacdf")) == [(["g", "a"], ["b", "h"])]
    # the true label does not fill up a list either
    assert OnPolicy(top=2, bottom=5).draw(SCORES, "c", context_of("")) == [(["a", "b"], ["d", "e", "f", "g", "h"])]
    assert OnPolicy(top=2, bottom=6).draw(SCORES, "c", context_of("")) == []


def test_the_teachers_next_ranks_fill_up_the_list_and_are_counted() -> None:
    sampler = OnPolicy(top=2, bottom=3, student_top_k=3)
    # of the first three answers one is chosen and one is true
    [(chosen, rejected)] = sampler.draw(SCORES, "d", context_of("adhgfe"))
    assert (chosen, rejected) == (["a", "b"], ["h", "c", "e"])
    assert sampler.count_fallbacks("r", rejected, context_of("adhgfe")) == 2


def test_without_an_answer_it_draws_the_same_as_hard() -> None:
    for context in (SamplerContext(), context_of(""), context_of("hgfe", student="s3://bucket/train-1")):
        assert OnPolicy(top=2).draw(SCORES, None, context) == Hard(top=2).draw(SCORES, None)
    assert OnPolicy(top=2).count_fallbacks("r", ["c", "d"], SamplerContext()) == 2


def test_it_uses_the_answers_of_its_own_student() -> None:
    context = SamplerContext(student_rankings={None: {"r": ["g", "h"]}, "out/train-1": {"r": ["f", "e"]}})
    assert OnPolicy(top=2).draw(SCORES, None, context) == [(["a", "b"], ["g", "h"])]
    assert OnPolicy(top=2, student="out/train-1").draw(SCORES, None, context) == [(["a", "b"], ["f", "e"])]


def test_a_mixture_requires_the_students_of_its_members_and_draws_as_they_do() -> None:
    members = (
        MixtureMember(sampler=OnPolicy()),
        MixtureMember(sampler=OnPolicy(student="out/train-1")),
        MixtureMember(sampler=Hard()),
    )
    mixture = Mixture(top=2, members=members)
    assert mixture.required_students == {None, "out/train-1"}
    assert Mixture(members=members[2:]).required_students == Hard().required_students == frozenset()
    # the true label is not rejected, as by the member alone
    numbered = {str(number): ["g", "h", "e"] for number in range(40)}
    context = SamplerContext(student_rankings={None: numbered, "out/train-1": numbered})
    drawn = [mixture.draw(dataclasses.replace(SCORES, record_id=str(number)), "g", context) for number in range(40)]
    assert {tuple(rejected) for [(_, rejected)] in drawn} == {("h", "e"), ("c", "d")}


def test_student_top_k_must_be_positive() -> None:
    with pytest.raises(ValueError, match="student_top_k must be positive, got 0"):
        OnPolicy(student_top_k=0)


def test_the_old_key_gets_an_error_that_names_the_new_one() -> None:
    with pytest.raises(UserError, match=r"within: unknown key \(got 5\); did you mean 'student_top_k'\?"):
        from_data(OnPolicy, {"within": 5})
