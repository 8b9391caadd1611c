"""What a student is shown ahead of a note: alike in any batch, within its context, chosen without the truth."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mint_ray.artifacts import Artifact, open_artifact
from mint_ray.loading import UserError, from_data
from mint_ray.records import Message, Record, from_table, to_table
from mint_ray.retrievers import Document
from mint_ray.retrievers.config import Retrieval, Table
from mint_ray.retrievers.passages import put_ahead
from mint_ray.stages.config import Evaluate
from mint_ray.stages.retrieval import (
    PassageActor,
    Passages,
    Query,
    Retrieved,
    RetrieverActor,
    Shelf,
    check_retrieval,
    measure_recall,
)
from mint_ray.students.config import Generation, Student
from tests.tiny import save_tiny_student

DOCUMENTS = [
    Document(
        document_id="n", title="Noonan syndrome", text="Short stature and a broad nasal bridge. " * 6, label_id="N"
    ),
    Document(
        document_id="m", title="Marfan syndrome", text="Tall stature, seizures never, long fingers.", label_id="M"
    ),
    Document(document_id="k", title="Kabuki syndrome", text="Short stature, seizures at times.", label_id="K"),
]
NOTES = ["A boy with short stature and seizures.", "A girl with long fingers.", "A broad nasal bridge."]
ANSWERS = [f"POTENTIAL_DISEASES:\n1. '{document.title}'" for document in DOCUMENTS]
SHELVES = [
    Shelf(
        record_id=f"r{i}",
        prompt=[
            Message(role="system", content="Keep to the format."),
            Message(role="user", content=f"{note}\n\nWhich?"),
        ],
        documents=DOCUMENTS[i:] + DOCUMENTS[:i],
        scores=[3.0, 2.0, 1.0],
    )
    for i, note in enumerate(NOTES)
]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    torch.set_num_threads(1)
    return Student(model_id=str(save_tiny_student(tmp_path_factory.mktemp("student"))))


def actor(student: Student, *, adaptive: bool = False, new_tokens: int = 16, **settings: Any) -> PassageActor:
    config = from_data(
        Evaluate,
        {
            "generation": {"max_new_tokens": new_tokens},
            "retrieval": {"adaptive": adaptive, **settings},
            "resources": {"cpus_per_actor": 1},
        },
    )
    return PassageActor(student, config, None, ANSWERS if adaptive else [])


def test_passages_stand_ahead_of_the_prompt_in_the_retrievers_order(student: Student) -> None:
    row = actor(student).choose(SHELVES[1])
    assert (row.document_ids, row.scores, row.left_out, row.cut) == (["m", "k", "n"], [3.0, 2.0, 1.0], [], False)
    assert row.words == [6, 5, 42]
    assert row.text.index("[1] Marfan syndrome") < row.text.index("[2] Kabuki syndrome") < row.text.index("[3] Noonan")
    assert put_ahead(SHELVES[1].prompt, row.text)[1].content.endswith("\n\nA girl with long fingers.\n\nWhich?")


def test_a_prompt_fits_into_what_the_context_leaves_beside_the_answer(student: Student) -> None:
    tokenizer = AutoTokenizer.from_pretrained(student.model_id)

    def tokens(prompt: list[Message]) -> int:
        ids = tokenizer.apply_chat_template([dataclasses.asdict(x) for x in prompt], add_generation_prompt=True)
        return len(ids["input_ids"])

    whole = tokens(put_ahead(SHELVES[0].prompt, actor(student).choose(SHELVES[0]).text))
    bare = tokens(SHELVES[0].prompt)
    for room in (whole, whole - 1, whole - 40, (whole + bare) // 2, bare + 1):
        row = actor(student, new_tokens=2048 - room).choose(SHELVES[0])
        assert tokens(put_ahead(SHELVES[0].prompt, row.text)) <= room
        assert row.cut == (room < whole)
        assert actor(student, max_prompt_tokens=room).choose(SHELVES[0]) == row
    assert row.left_out == ["n", "m", "k"]
    short = actor(student, max_prompt_tokens=tokens(SHELVES[0].prompt)).choose(SHELVES[0])
    assert (short.document_ids, short.text, short.left_out) == ([], "", ["n", "m", "k"])


def plain_confidence(student: Student, prompt: list[Message]) -> float:
    """log-softmax of the best of ANSWERS behind the prompt, each in a plain pass of its own."""
    tokenizer = AutoTokenizer.from_pretrained(student.model_id)
    model = AutoModelForCausalLM.from_pretrained(student.model_id).eval()
    messages = [dataclasses.asdict(message) for message in prompt]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    totals = []
    for answer in ANSWERS:
        named = tokenizer(answer, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logps = model(torch.tensor([ids + named])).logits[0].double().log_softmax(-1)
        totals.append(sum(float(logps[len(ids) - 1 + i, token]) for i, token in enumerate(named)))
    return max(totals) - math.log(sum(math.exp(total) for total in totals))


def test_an_adaptive_student_is_shown_what_makes_it_surer(student: Student) -> None:
    chooser, everything = actor(student, adaptive=True), actor(student)
    for shelf in SHELVES:
        row = chooser.choose(shelf)
        assert len(row.confidence) == len(DOCUMENTS) + 1
        assert row.confidence[0] == pytest.approx(plain_confidence(student, shelf.prompt), abs=1e-3)
        # what is shown was scored as it is shown, and it is the surest of all that was tried
        shown = plain_confidence(student, put_ahead(shelf.prompt, row.text))
        assert shown == pytest.approx(max(row.confidence), abs=1e-3)
        assert sorted(row.document_ids + row.left_out) == ["k", "m", "n"]
        assert [i for i in everything.choose(shelf).document_ids if i in row.document_ids] == row.document_ids
    chosen = {tuple(chooser.choose(shelf).document_ids) for shelf in SHELVES}
    assert any(len(ids) < len(DOCUMENTS) for ids in chosen)
    assert any(chosen)


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_record_is_shown_the_same_in_any_batch(student: Student, adaptive: bool) -> None:
    chooser = actor(student, adaptive=adaptive)

    def rows(shelves: list[Shelf]) -> list[Passages]:
        return from_table(Passages, chooser(to_table(shelves, Shelf)))

    together = rows(SHELVES)
    assert [rows([shelf])[0] for shelf in SHELVES] == together
    assert rows(SHELVES[::-1]) == together[::-1]


def test_what_is_searched_with_and_chosen_from_holds_no_truth() -> None:
    names = {field.name for row in (Query, Shelf) for field in dataclasses.fields(row)}
    assert names == {"record_id", "note", "prompt", "documents", "scores"}


def documents_artifact(tmp_path: Path) -> Artifact:
    artifact = open_artifact(str(tmp_path), "documents", {}, {})
    with artifact.write() as draft:
        draft.write_rows(Document, "documents", DOCUMENTS)
    return artifact


def test_the_index_finds_at_most_so_many(tmp_path: Path) -> None:
    found = RetrieverActor(Retrieval(passages=2), documents_artifact(tmp_path))
    queries = [Query(record_id=f"r{i}", note=note) for i, note in enumerate([*NOTES, "Nothing of the kind"])]
    rows = from_table(Retrieved, found(to_table(queries, Query)))
    assert [(row.record_id, row.document_ids) for row in rows[1:]] == [("r1", ["m"]), ("r2", ["n"]), ("r3", [])]
    assert len(rows[0].document_ids) == 2


def test_recall_is_the_share_whose_own_label_was_found() -> None:
    records = [
        Record(record_id=f"r{i}", group_id="g", label_id=label) for i, label in enumerate(["N", "M", "K", "X", None])
    ]
    found = {"r0": ["m", "n"], "r1": ["k"], "r2": ["k"], "r3": ["m"], "r4": []}
    # of X there is no document, and who has no label is not judged
    assert measure_recall(records, DOCUMENTS, found) == {"recall": 0.6667, "records": 3}
    plain = [dataclasses.replace(document, label_id=None) for document in DOCUMENTS]
    assert measure_recall(records, plain, found) == {}


def test_what_is_missing_is_named_before_any_work(tmp_path: Path) -> None:
    missing = Retrieval(documents=Table(uri=str(tmp_path / "none.csv")))
    with pytest.raises(UserError, match=r"evaluate\.retrieval: .*none\.csv: no such file"):
        check_retrieval(missing)
    unknown = from_data(Retrieval, {"retriever": {"kind": "dense", "model_id": "no/where"}})
    with pytest.raises(UserError, match=r"evaluate\.retrieval: model_id: no folder 'no/where'"):
        check_retrieval(unknown)
    check_retrieval(Retrieval())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"passages": 0}, "passages must be positive, got 0"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens must be positive, got 0"),
        ({"retriever": {"kind": "bm25", "b": 2}}, "b must lie in 0 to 1, got 2"),
        ({"retriever": {"kind": "dense", "model_id": "m", "revision": "main"}}, "commit of 40 hexadecimal digits"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        from_data(Retrieval, settings)
    assert message in str(caught.value)


def test_generation_without_retrieval_is_as_before() -> None:
    assert Evaluate().retrieval is None
    assert Evaluate(generation=Generation()).general is None
