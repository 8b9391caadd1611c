"""What a student is shown ahead of a note: alike in any batch, within its context, chosen without the truth."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mint_ray.artifacts import open_artifact, verify
from mint_ray.config.loader import UserError, from_data
from mint_ray.config.stages import Evaluate
from mint_ray.records import Label, Message, Phenotype, Record
from mint_ray.retrievers import Document
from mint_ray.retrievers.config import Retrieval, Table
from mint_ray.retrievers.passages import put_ahead
from mint_ray.stages.retrieve import (
    PassageActor,
    Passages,
    RecordsPart,
    Retrieved,
    RetrieverActor,
    check_retrieval,
    measure_recall,
)
from mint_ray.students.config import Student
from mint_ray.tasks import build_task
from mint_ray.tasks.config import RareDisease
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
LABELS = [Label(label_id=str(document.label_id), name=document.title) for document in DOCUMENTS]
NOTES = [
    "A boy with short stature and seizures.",
    "A girl with long fingers.",
    "A broad nasal bridge.",
    "Nothing of it.",
]
RECORDS = [
    Record(record_id=f"r{i}", group_id=f"g{i}", label_id=LABELS[i % 3].label_id, split=split, text=note)
    for i, (note, split) in enumerate(zip([*NOTES, "A boy."], ["test"] * 4 + ["train"], strict=True))
]  # fmt: skip
TASK, LENGTH = RareDisease(), 1
PROMPTS = [build_task(TASK, LABELS, LENGTH).prompt(record) for record in RECORDS]
FOUND = [
    Retrieved(record_id=f"r{i}", documents=DOCUMENTS[i % 3 :] + DOCUMENTS[: i % 3], scores=[3.0, 2.0, 1.0])
    for i in range(4)
]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    torch.set_num_threads(1)
    return Student(model_id=str(save_tiny_student(tmp_path_factory.mktemp("student"))))


def evaluate(*, adaptive: bool = False, new_tokens: int = 16, **settings: Any) -> Evaluate:
    data = {
        "generation": {"max_new_tokens": new_tokens},
        "retrieval": {"adaptive": adaptive, **settings},
        "resources": {"cpus_per_actor": 1},
    }
    return from_data(Evaluate, data)


def actor(student: Student, root: str = "nowhere", **settings: Any) -> PassageActor:
    """One that is asked record by record; it need not find artifacts for that."""
    nowhere = open_artifact(root, "passages", {}, {})
    return PassageActor(nowhere, evaluate(**settings), TASK, LABELS, LENGTH, nowhere, student, None)


def test_passages_stand_ahead_of_the_prompt_in_the_retrievers_order(student: Student) -> None:
    row = actor(student).choose(PROMPTS[1], FOUND[1])
    assert (row.document_ids, row.scores, row.left_out, row.cut) == (["m", "k", "n"], [3.0, 2.0, 1.0], [], False)
    assert row.words == [6, 5, 42]
    assert row.text.index("[1] Marfan syndrome") < row.text.index("[2] Kabuki syndrome") < row.text.index("[3] Noonan")
    system, user = put_ahead(PROMPTS[1], row.text)
    assert system == PROMPTS[1][0]
    assert user.content == f"{row.text}\n\n{PROMPTS[1][1].content}"
    assert "\n\nA girl with long fingers.\n\nName the most likely disease" in user.content


def test_a_prompt_fits_into_what_the_context_leaves_beside_the_answer(student: Student) -> None:
    tokenizer = AutoTokenizer.from_pretrained(student.model_id)

    def tokens(prompt: list[Message]) -> int:
        ids = tokenizer.apply_chat_template([dataclasses.asdict(x) for x in prompt], add_generation_prompt=True)
        return len(ids["input_ids"])

    whole = tokens(put_ahead(PROMPTS[0], actor(student).choose(PROMPTS[0], FOUND[0]).text))
    bare = tokens(PROMPTS[0])
    for room in (whole, whole - 1, whole - 40, (whole + bare) // 2, bare + 1):
        row = actor(student, new_tokens=2048 - room).choose(PROMPTS[0], FOUND[0])
        assert tokens(put_ahead(PROMPTS[0], row.text)) <= room
        assert row.cut == (room < whole)
        assert actor(student, max_prompt_tokens=room).choose(PROMPTS[0], FOUND[0]) == row
    assert row.left_out == ["n", "m", "k"]
    short = actor(student, max_prompt_tokens=3).choose(PROMPTS[0], FOUND[0])
    assert (short.document_ids, short.text, short.left_out) == ([], "", ["n", "m", "k"])


def plain_confidence(student: Student, prompt: list[Message]) -> float:
    """log-softmax of the best of the labels' names behind the prompt, each in a plain pass of its own."""
    tokenizer = AutoTokenizer.from_pretrained(student.model_id)
    model = AutoModelForCausalLM.from_pretrained(student.model_id).eval()
    messages = [dataclasses.asdict(message) for message in prompt]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    totals = []
    for label in LABELS:
        answer = tokenizer(f"POTENTIAL_DISEASES:\n1. '{label.name}'", add_special_tokens=False)["input_ids"]
        named = [*answer, tokenizer.eos_token_id]  # a list of one ends behind it
        with torch.no_grad():
            logps = model(torch.tensor([ids + named])).logits[0].double().log_softmax(-1)
        totals.append(sum(float(logps[len(ids) - 1 + i, token]) for i, token in enumerate(named)))
    return max(totals) - math.log(sum(math.exp(total) for total in totals))


def test_an_adaptive_student_is_shown_what_makes_it_surer(student: Student) -> None:
    chooser = actor(student, adaptive=True)
    rows = [chooser.choose(prompt, found) for prompt, found in zip(PROMPTS, FOUND, strict=False)]
    for prompt, found, row in zip(PROMPTS, FOUND, rows, strict=False):
        assert len(row.confidence) == len(DOCUMENTS) + 1
        assert row.confidence[0] == pytest.approx(plain_confidence(student, prompt), abs=1e-3)
        # what is shown was scored as it is shown, and is the surest of all that was tried
        shown = plain_confidence(student, put_ahead(prompt, row.text))
        assert shown == pytest.approx(max(row.confidence), abs=1e-3)
        order = [document.document_id for document in found.documents]
        assert row.document_ids == [i for i in order if i in row.document_ids]
        assert row.left_out == [i for i in order if i not in row.document_ids]
    assert any(len(row.document_ids) < len(DOCUMENTS) for row in rows)
    assert any(row.document_ids for row in rows)


def through_the_actors(root: Path, student: Student, rows_per_part: int, *, adaptive: bool) -> list[Any]:
    """What both actors write of records in parts of so many rows: what was found, and what is shown."""
    records, documents, retrieved, passages = (
        open_artifact(str(root), name, {"rows_per_part": rows_per_part}, {})
        for name in ("prepare", "documents", "retrieve", "passages")
    )
    with records.write() as draft:
        draft.write_rows(Record, "records", RECORDS, rows_per_part=rows_per_part)
    with documents.write() as draft:
        draft.write_rows(Document, "documents", DOCUMENTS)
    config = evaluate(adaptive=adaptive, passages=2)
    assert config.retrieval is not None
    searcher = RetrieverActor(retrieved, config, TASK, LABELS, LENGTH, documents)
    chooser = PassageActor(passages, config, TASK, LABELS, LENGTH, retrieved, student, None)
    found: list[Any] = []
    for artifact, table, worker, row in (
        (retrieved, "retrieved", searcher, Retrieved),
        (passages, "passages", chooser, Passages),
    ):
        with artifact.write() as draft:
            for file in records.table_files("records"):
                path = file.path.replace("records", table)
                part = worker.work(RecordsPart(path=path, uri=records.file_uri(file.path)))
                draft.placed += part.files
        assert verify(artifact.uri) == []
        found.append(artifact.rows(row, table))
    return found


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_record_is_shown_the_same_however_records_are_cut_into_parts(
    tmp_path: Path, student: Student, adaptive: bool
) -> None:
    found, shown = through_the_actors(tmp_path, student, 100, adaptive=adaptive)
    assert [row.record_id for row in found] == [row.record_id for row in shown] == ["r0", "r1", "r2", "r3"]
    assert [[document.document_id for document in row.documents] for row in found[1:]] == [["m"], ["n"], []]
    assert len(found[0].documents) == 2
    assert shown[3].text == ""
    for rows_per_part in (1, 2):
        assert through_the_actors(tmp_path, student, rows_per_part, adaptive=adaptive) == [found, shown]


def test_passages_do_not_depend_on_what_the_note_does_not_say(tmp_path: Path) -> None:
    documents = open_artifact(str(tmp_path), "documents", {}, {})
    with documents.write() as draft:
        draft.write_rows(Document, "documents", DOCUMENTS)
    searcher = RetrieverActor(documents, Evaluate(retrieval=Retrieval()), TASK, LABELS, LENGTH, documents)
    told = dataclasses.replace(RECORDS[0], text="A boy with seizures.")
    hidden = dataclasses.replace(
        told, label_id="M", fields={"gene": "FBN1"}, citations=["PMID:1"], image_uri="marfan.png",
        phenotypes=[Phenotype(id="HP:0001166", label="Long fingers")],
    )  # fmt: skip
    notes = [searcher.task.note(record) for record in (told, hidden)]
    first, second = searcher.search(["r", "r"], notes)
    assert first == second
    assert [document.document_id for document in first.documents] == ["k", "m"]


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
