"""Pairs that the tests of the exports write."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mint_ray.artifacts import Artifact, open_artifact
from mint_ray.records import Message, PreferencePair


def make_pair(number: int, *, system: bool = True, turns: int = 1, last: str = "user") -> PreferencePair:
    prompt = [Message(role="system", content="Keep to the format.")] if system else []
    roles = ["user", "assistant"] * turns
    prompt += [Message(role=role, content=f"{role} {number}:\n“é”\u2028 {at}") for at, role in enumerate(roles[:-1])]
    prompt[-1] = Message(role=last, content=prompt[-1].content)
    return PreferencePair(
        prompt=prompt,
        chosen=[Message(role="assistant", content=f"1. 'Noonan {number}'")],
        rejected=[Message(role="assistant", content=f"1. 'Marfan {number}'")],
        record_id=f"r{number}", split="train", teacher="t", sampler="hard", chosen_labels=["a"], rejected_labels=["b"],
    )  # fmt: skip


TRAIN = [make_pair(number, system=number % 2 == 0, turns=1 + number % 3) for number in range(7)]
VALIDATION = [make_pair(number) for number in range(7, 9)]
WITH_IMAGES = [
    dataclasses.replace(make_pair(number, system=number % 2 == 0, turns=1 + number % 2), image_uri=f"images/{number}.jpg")
    for number in range(4)
]  # fmt: skip


def write_pairs(root: Path | str, train: list[PreferencePair], validation: list[PreferencePair]) -> Artifact:
    artifact = open_artifact(str(root), "pair", {}, {})
    with artifact.write() as draft:
        draft.write_rows(PreferencePair, "train", train, rows_per_part=3)
        draft.write_rows(PreferencePair, "validation", validation)
    return artifact
