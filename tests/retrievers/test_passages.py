"""Format, truncation and recall of passages."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mint_ray.records import Message, Record
from mint_ray.retrievers import Document
from mint_ray.retrievers.passages import MIN_WORDS, allocate_words, format_passages, measure_recall, prepend_passages

PROMPT = [
    Message(role="system", content="You are a genetic counsellor."),
    Message(role="user", content="A boy has  two   spaces.\n\nList the 3 most likely diseases"),
]
DOCUMENTS = [
    Document(document_id="a", title="Alpha", text=" ".join(f"a{i}" for i in range(12))),
    Document(document_id="b", title="", text=" ".join(f"b{i}" for i in range(8))),
    Document(document_id="c", title="Gamma", text="short\ntext"),
]


def count(prompt: Sequence[Message]) -> int:
    return sum(len(message.content.split()) for message in prompt)


def test_passages_are_numbered_and_titled_and_marked_if_truncated() -> None:
    assert format_passages(DOCUMENTS, [3, 8, 2]) == (
        "Passages from reference works, best match first. They may be about other cases.\n\n"
        "[1] Alpha\na0 a1 a2 ...\n\n"
        "[2]\nb0 b1 b2 b3 b4 b5 b6 b7\n\n"
        "[3] Gamma\nshort text\n\n"
        "The case to answer:"
    )
    assert format_passages([], []) == ""


def test_the_prompt_is_unchanged_after_them() -> None:
    system, user = prepend_passages(PROMPT, "PASSAGES")
    assert system == PROMPT[0]
    assert user == Message(role="user", content="PASSAGES\n\n" + PROMPT[1].content)
    assert prepend_passages(PROMPT, "") == PROMPT


def test_passages_that_fit_are_not_truncated_below_the_limit() -> None:
    assert allocate_words(PROMPT, DOCUMENTS, 100, 1000, count) == [12, 8, 2]
    assert allocate_words(PROMPT, DOCUMENTS, 7, 1000, count) == [7, 7, 2]


def test_the_last_passage_is_truncated_first_and_dropped_if_too_short() -> None:
    whole = count(prepend_passages(PROMPT, format_passages(DOCUMENTS[:2], [12, 8])))
    # an ellipsis counts as a word
    assert allocate_words(PROMPT, DOCUMENTS, 100, whole, count) == [12, 8]
    assert allocate_words(PROMPT, DOCUMENTS, 100, whole - 1, count) == [12, 6]
    assert allocate_words(PROMPT, DOCUMENTS, 100, whole - 8 + MIN_WORDS, count) == [12]


def test_a_prompt_without_room_gets_no_passages() -> None:
    assert allocate_words(PROMPT, DOCUMENTS, 100, count(PROMPT), count) == []
    assert allocate_words(PROMPT, DOCUMENTS, 100, 3, count) == []
    assert allocate_words(PROMPT, [], 100, 1000, count) == []


@given(max_words=st.integers(1, 20), room=st.integers(0, 80))
def test_the_maximum_prompt_length_is_used_and_never_exceeded(max_words: int, room: int) -> None:
    words = allocate_words(PROMPT, DOCUMENTS, max_words, count(PROMPT) + room, count)
    result = prepend_passages(PROMPT, format_passages(DOCUMENTS[: len(words)], words))
    assert count(result) <= count(PROMPT) + room
    assert all(number <= max_words for number in words)
    lengths = [min(max_words, len(document.text.split())) for document in DOCUMENTS]
    if words != lengths:
        # the next passage would not have fitted completely
        more = lengths[: len(words) + (words == lengths[: len(words)])]
        assert count(prepend_passages(PROMPT, format_passages(DOCUMENTS[: len(more)], more))) > count(PROMPT) + room


@pytest.mark.parametrize("words", [[1], [1, 2, 3, 4]])
def test_each_document_needs_its_words(words: list[int]) -> None:
    with pytest.raises(ValueError, match="zip"):
        format_passages(DOCUMENTS, words)


def test_recall_counts_records_whose_label_has_a_document() -> None:
    documents = [Document(document_id=key, title="", text="x", label_id=label) for key, label in ("aA", "bB", "cA")]
    records = [Record(record_id=key, group_id=key, label_id=label) for key, label in ("1A", "2B", "3C")]
    found = {"1": ["b", "c"], "2": ["a"], "3": ["a"]}
    assert measure_recall(records, documents, found) == {"recall": 0.5, "records": 2}
    assert measure_recall(records[2:], documents, found) == {}
