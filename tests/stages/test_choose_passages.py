"""Passages fit the student's context, and are chosen without the true label, for each record by itself."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mint_ray.artifacts import Artifact, open_artifact, verify
from mint_ray.lineage import AnswerRequest
from mint_ray.records import Message
from mint_ray.retrievers.passages import ChosenPassages, Retrieved, prepend_passages
from mint_ray.stages import choose_passages as module
from mint_ray.stages import retrieve as retrieve_module
from mint_ray.stages.choose_passages import PassageActor, choose_passages
from mint_ray.stages.retrieve import retrieve_documents
from mint_ray.students.config import Generation, Student
from tests.stages.inputs import map_parts_here
from tests.stages.retrieval import DOCUMENTS, LABELS, NUM_LABELS, PROMPTS, TASK, retrieval_config, write_noted_records
from tests.tiny import save_tiny_student

RETRIEVED = [
    Retrieved(record_id=f"r{i}", documents=DOCUMENTS[i % 3 :] + DOCUMENTS[: i % 3], scores=[3.0, 2.0, 1.0])
    for i in range(4)
]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    torch.set_num_threads(1)
    return Student(model_id=str(save_tiny_student(tmp_path_factory.mktemp("student"))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


def make_request(student: Student) -> AnswerRequest:
    return AnswerRequest(student=student, generation=Generation(), task=TASK, num_labels=NUM_LABELS)


def make_actor(student: Student, folder: Path, **settings: Any) -> PassageActor:
    """Return an actor for `choose` alone; its artifact is not written."""
    artifact = open_artifact(str(folder), "choose_passages", {}, {})
    return PassageActor(artifact, retrieval_config(folder / "documents", **settings), make_request(student), LABELS)


def test_passages_are_ahead_of_the_prompt_in_the_order_of_the_retriever(student: Student, folder: Path) -> None:
    row = make_actor(student, folder).choose(PROMPTS[1], RETRIEVED[1])
    assert (row.document_ids, row.scores, row.skipped, row.truncated) == (["m", "k", "n"], [3.0, 2.0, 1.0], [], False)
    assert row.words == [6, 5, 42]
    assert row.text.index("[1] Marfan syndrome") < row.text.index("[2] Kabuki syndrome") < row.text.index("[3] Noonan")
    system, user = prepend_passages(PROMPTS[1], row.text)
    assert system == PROMPTS[1][0]
    assert user.content == f"{row.text}\n\n{PROMPTS[1][1].content}"
    assert "\n\nA girl with long fingers.\n\nName the most likely disease" in user.content


def test_a_prompt_leaves_room_for_the_answer_in_the_context(student: Student, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(student.model_id)

    def tokens(prompt: list[Message]) -> int:
        messages = [dataclasses.asdict(message) for message in prompt]
        return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])

    longest = tokens(prepend_passages(PROMPTS[0], make_actor(student, folder).choose(PROMPTS[0], RETRIEVED[0]).text))
    shortest = tokens(PROMPTS[0])
    for limit in (longest, longest - 1, longest - 40, (longest + shortest) // 2, shortest + 1):
        row = make_actor(student, folder, max_new_tokens=2048 - limit).choose(PROMPTS[0], RETRIEVED[0])
        assert tokens(prepend_passages(PROMPTS[0], row.text)) <= limit
        assert row.truncated == (limit < longest)
        assert make_actor(student, folder, max_prompt_tokens=limit).choose(PROMPTS[0], RETRIEVED[0]) == row
    assert row.skipped == ["n", "m", "k"]
    none = make_actor(student, folder, max_prompt_tokens=3).choose(PROMPTS[0], RETRIEVED[0])
    assert (none.document_ids, none.text, none.skipped) == ([], "", ["n", "m", "k"])


def expected_confidence(student: Student, prompt: list[Message]) -> float:
    """Return the log-softmax of the most likely label's name after the prompt, from a forward pass per name."""
    tokenizer = AutoTokenizer.from_pretrained(student.model_id)
    model = AutoModelForCausalLM.from_pretrained(student.model_id).eval()
    messages = [dataclasses.asdict(message) for message in prompt]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    totals = []
    for label in LABELS:
        answer = tokenizer(f"POTENTIAL_DISEASES:\n1. '{label.name}'", add_special_tokens=False)["input_ids"]
        completion = [*answer, tokenizer.eos_token_id]  # a list of one label ends after it
        with torch.no_grad():
            logps = model(torch.tensor([ids + completion])).logits[0].double().log_softmax(-1)
        totals.append(sum(float(logps[len(ids) - 1 + i, token]) for i, token in enumerate(completion)))
    return max(totals) - math.log(sum(math.exp(total) for total in totals))


def test_adaptive_retrieval_keeps_the_passages_with_which_the_student_is_most_confident(
    student: Student, folder: Path
) -> None:
    actor = make_actor(student, folder, adaptive=True)
    rows = [actor.choose(prompt, found) for prompt, found in zip(PROMPTS, RETRIEVED, strict=False)]
    for prompt, found, row in zip(PROMPTS, RETRIEVED, rows, strict=False):
        assert len(row.confidence) == len(DOCUMENTS) + 1
        assert row.confidence[0] == pytest.approx(expected_confidence(student, prompt), abs=1e-3)
        with_passages = expected_confidence(student, prepend_passages(prompt, row.text))
        assert with_passages == pytest.approx(max(row.confidence), abs=1e-3)
        order = [document.document_id for document in found.documents]
        assert row.document_ids == [i for i in order if i in row.document_ids]
        assert row.skipped == [i for i in order if i not in row.document_ids]
    assert any(len(row.document_ids) < len(DOCUMENTS) for row in rows)
    assert any(row.document_ids for row in rows)


def choose(root: Path, student: Student, rows_per_part: int, *, adaptive: bool) -> Artifact:
    config = retrieval_config(root / "documents", adaptive=adaptive, max_passages=2)
    records = write_noted_records(root, rows_per_part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "map_parts", map_parts_here)
        patch.setattr(retrieve_module, "map_parts", map_parts_here)
        retrieved = retrieve_documents(str(root), config, TASK, records)
        return choose_passages(str(root), config, make_request(student), records, retrieved)


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_record_gets_the_same_passages_in_parts_of_any_size(tmp_path: Path, student: Student, adaptive: bool) -> None:
    chosen = choose(tmp_path, student, 100, adaptive=adaptive)
    rows = chosen.rows(ChosenPassages, "passages")
    assert [row.record_id for row in rows] == ["r0", "r1", "r2", "r3"]
    assert rows[3].text == ""
    for rows_per_part in (1, 2):
        other = choose(tmp_path, student, rows_per_part, adaptive=adaptive)
        assert other.rows(ChosenPassages, "passages") == rows
        assert other.manifest.metrics == chosen.manifest.metrics
        assert verify(other.uri) == []


def test_passages_and_their_recall_are_counted(tmp_path: Path, student: Student) -> None:
    chosen = choose(tmp_path, student, 100, adaptive=False)
    rows = chosen.rows(ChosenPassages, "passages")
    assert chosen.manifest.counts == {
        "records": 4,
        "passages": sum(len(row.document_ids) for row in rows),
        "documents_skipped": 0,
        "records_with_truncated_passages": 0,
    }
    # without adaptive retrieval every retrieved document is read
    assert chosen.manifest.metrics["shown"] == chosen.manifest.metrics["retrieved"] == {"recall": 0.5, "records": 4}
