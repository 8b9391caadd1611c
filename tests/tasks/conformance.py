"""Checks that every task must pass; `test_conformance.py` runs them on each."""

from __future__ import annotations

import pickle

import pytest

from mint_ray.records import Record
from mint_ray.tasks import Answer, Task


def check_task(task: Task, record: Record, length: int) -> None:
    """Assert the interface of a task that asks for lists of `length`, on a record of one of its labels."""
    ids = [label.label_id for label in task.labels]
    check_answers(task, ids, length)
    check_prompt(task, record)
    for modality in task.modalities:
        ablated = task.ablate(record, modality)
        assert ablated != record, "the record has every modality"
        assert (ablated.record_id, ablated.group_id, ablated.label_id) == (
            record.record_id, record.group_id, record.label_id,
        )  # fmt: skip
        assert task.ablate(ablated, modality) == ablated
    with pytest.raises(ValueError, match=f"expected one of {', '.join(task.modalities)}, got 'smell'"):
        task.ablate(record, "smell")
    assert all(caveat.endswith(".") for caveat in task.caveats())
    assert any(f"list of {length} " in caveat for caveat in task.caveats())
    assert pickle.loads(pickle.dumps(task)).prompt(record) == task.prompt(record)  # noqa: S301


def check_answers(task: Task, ids: list[str], length: int) -> None:
    """Assert that answers are parsed back, and that other texts have a reason."""
    for label_id in ids:
        assert task.parse(task.answer([label_id])).labels == [label_id]
    listed = (ids * length)[:length]
    assert task.parse(task.answer(listed)) == Answer(labels=listed, names=task.parse(task.answer(listed)).names)
    assert task.parse(task.answer([*listed, ids[0]])) == Answer(reason="too_many")
    assert task.parse(" \n") == Answer(reason="empty")
    assert task.parse("I do not know.") == Answer(reason="no_list")
    unknown = task.parse(task.answer(ids[:1]).replace(task.labels[0].name, "no such label"))
    assert unknown == Answer(labels=[""], names=["no such label"])
    with pytest.raises(KeyError):
        task.answer(["no such id"])


def check_prompt(task: Task, record: Record) -> None:
    """Assert that the prompt contains the note and asks for an answer, and that the note does not name the label."""
    prompt = task.prompt(record)
    assert [message.role for message in prompt][-1] == "user"
    assert task.note(record) in prompt[-1].content
    assert all(message.content for message in prompt)
    assert task.prompt(record) == prompt
    assert task.find_label_leak(record) is None
    assert isinstance(task.show_image, bool)
