"""What the student answers is rejected, by hand-made answers."""

from __future__ import annotations

import dataclasses

import pytest

from mint_ray.records import TeacherScores
from mint_ray.samplers import Hard, Knowledge, Mixture, OnPolicy, Share

LABELS = list("abcdefgh")
SCORES = TeacherScores(
    record_id="r", split="train", teacher="t", labels=LABELS, scores=[float(-rank) for rank in range(8)]
)


def knowing(answers: str, student: str | None = None) -> Knowledge:
    return Knowledge(answers={student: {"r": list(answers)}})


def test_the_likeliest_labels_that_are_not_chosen_are_rejected_in_the_order_of_the_student() -> None:
    sampler = OnPolicy(top=2, pairs_per_record=2)
    drawn = sampler.draw(SCORES, None, knowing("gbheacdf"))
    assert drawn == [(["a", "b"], ["g", "h"]), (["a", "b"], ["e", "c"])]
    assert [sampler.filled("r", rejected, knowing("gbheacdf")) for _, rejected in drawn] == [0, 0]


def test_a_true_label_is_no_wrong_answer_wherever_the_teacher_has_it() -> None:
    assert OnPolicy(top=2).draw(SCORES, "g", knowing("gbheacdf")) == [(["a", "b"], ["h", "e"])]
    assert OnPolicy(top=2, truth_first=True).draw(SCORES, "g", knowing("gbheacdf")) == [(["g", "a"], ["b", "h"])]
    # nor does it fill up a list
    assert OnPolicy(top=2, bottom=5).draw(SCORES, "c", knowing("")) == [(["a", "b"], ["d", "e", "f", "g", "h"])]
    assert OnPolicy(top=2, bottom=6).draw(SCORES, "c", knowing("")) == []


def test_the_ranks_below_the_cut_fill_up_what_the_student_does_not_answer_and_are_counted() -> None:
    sampler = OnPolicy(top=2, bottom=3, within=3)
    # of the first three answers one is chosen and one is true
    [(chosen, rejected)] = sampler.draw(SCORES, "d", knowing("adhgfe"))
    assert (chosen, rejected) == (["a", "b"], ["h", "c", "e"])
    assert sampler.filled("r", rejected, knowing("adhgfe")) == 2


def test_without_an_answer_it_draws_what_hard_draws() -> None:
    for knowledge in (Knowledge(), knowing(""), knowing("hgfe", student="s3://bucket/train-1")):
        assert OnPolicy(top=2).draw(SCORES, None, knowledge) == Hard(top=2).draw(SCORES, None)
    assert OnPolicy(top=2).filled("r", ["c", "d"], Knowledge()) == 2


def test_it_reads_the_answers_of_the_student_that_it_names() -> None:
    knowledge = Knowledge(answers={None: {"r": ["g", "h"]}, "out/train-1": {"r": ["f", "e"]}})
    assert OnPolicy(top=2).draw(SCORES, None, knowledge) == [(["a", "b"], ["g", "h"])]
    assert OnPolicy(top=2, student="out/train-1").draw(SCORES, None, knowledge) == [(["a", "b"], ["f", "e"])]


def test_a_mixture_asks_the_students_of_its_members_and_draws_as_they_do() -> None:
    members = (Share(sampler=OnPolicy()), Share(sampler=OnPolicy(student="out/train-1")), Share(sampler=Hard()))
    mixture = Mixture(top=2, members=members)
    assert mixture.students == {None, "out/train-1"}
    assert Mixture(members=members[2:]).students == Hard().students == frozenset()
    # the true label too is left out of what is rejected, as by the member alone
    numbered = {str(number): ["g", "h", "e"] for number in range(40)}
    knowledge = Knowledge(answers={None: numbered, "out/train-1": numbered})
    drawn = [mixture.draw(dataclasses.replace(SCORES, record_id=str(number)), "g", knowledge) for number in range(40)]
    assert {tuple(rejected) for [(_, rejected)] in drawn} == {("h", "e"), ("c", "d")}


def test_at_least_one_label_is_an_answer() -> None:
    with pytest.raises(ValueError, match="within must be positive, got 0"):
        OnPolicy(within=0)
