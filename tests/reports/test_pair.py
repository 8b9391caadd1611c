"""A preference pair as plain text."""

from __future__ import annotations

import dataclasses

from mint_ray.records import Message, PreferencePair
from mint_ray.reports.pair import render_pair

PAIR = PreferencePair(
    prompt=[Message(role="system", content="Keep to the format."), Message(role="user", content="A boy.")],
    chosen=[Message(role="assistant", content="1. 'Marfan syndrome'\n2. 'Rett syndrome'")],
    rejected=[Message(role="assistant", content="1. 'Noonan syndrome'")],
    record_id="r7", split="train", teacher="ontology", sampler="hard", chosen_labels=["a", "b"], rejected_labels=["c"],
    chosen_scores=[0.75, 0.5], rejected_scores=[0.25], difficulty=0.5,
)  # fmt: skip


def test_a_pair_shows_both_answers_and_the_scores_of_their_labels() -> None:
    assert render_pair(PAIR).splitlines() == [
        "--- r7: sampler hard, teacher ontology, difficulty 0.50",
        "[system] Keep to the format.",
        "[user] A boy.",
        "",
        "CHOSEN                |  REJECTED",
        "1. 'Marfan syndrome'  |  1. 'Noonan syndrome'",
        "2. 'Rett syndrome'    |",
        "teacher's score       |  teacher's score",
        "  0.7500  a           |    0.2500  c",
        "  0.5000  b           |",
    ]


def test_an_image_comes_before_the_first_user_turn() -> None:
    lines = render_pair(dataclasses.replace(PAIR, image_uri="images/7.jpg", difficulty=None)).splitlines()
    assert lines[0] == "--- r7: sampler hard, teacher ontology"
    assert lines[2:4] == ["[image] images/7.jpg", "[user] A boy."]
