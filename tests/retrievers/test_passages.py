from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mint_ray.records import Message
from mint_ray.retrievers import Document
from mint_ray.retrievers.passages import LEAST_WORDS, fit_words, put_ahead, write_passages

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


def test_passages_are_numbered_and_titled_and_say_where_they_were_cut() -> None:
    assert write_passages(DOCUMENTS, [3, 8, 2]) == (
        "Passages from reference works, best match first. They may be about other cases.\n\n"
        "[1] Alpha\na0 a1 a2 ...\n\n"
        "[2]\nb0 b1 b2 b3 b4 b5 b6 b7\n\n"
        "[3] Gamma\nshort text\n\n"
        "The case to answer:"
    )
    assert write_passages([], []) == ""


def test_the_prompt_stays_word_for_word_behind_them() -> None:
    system, user = put_ahead(PROMPT, "PASSAGES")
    assert system == PROMPT[0]
    assert user == Message(role="user", content="PASSAGES\n\n" + PROMPT[1].content)
    assert put_ahead(PROMPT, "") == PROMPT


def test_what_fits_is_shown_whole_up_to_the_longest_passage() -> None:
    assert fit_words(PROMPT, DOCUMENTS, 100, 1000, count) == [12, 8, 2]
    assert fit_words(PROMPT, DOCUMENTS, 7, 1000, count) == [7, 7, 2]


def test_the_last_passage_is_cut_first_and_a_scrap_is_not_shown() -> None:
    whole = count(put_ahead(PROMPT, write_passages(DOCUMENTS[:2], [12, 8])))
    # an ellipsis counts as a word
    assert fit_words(PROMPT, DOCUMENTS, 100, whole, count) == [12, 8]
    assert fit_words(PROMPT, DOCUMENTS, 100, whole - 1, count) == [12, 6]
    assert fit_words(PROMPT, DOCUMENTS, 100, whole - 8 + LEAST_WORDS, count) == [12]


def test_a_prompt_without_room_gets_none() -> None:
    assert fit_words(PROMPT, DOCUMENTS, 100, count(PROMPT), count) == []
    assert fit_words(PROMPT, DOCUMENTS, 100, 3, count) == []
    assert fit_words(PROMPT, [], 100, 1000, count) == []


@given(most=st.integers(1, 20), room=st.integers(0, 80))
def test_the_longest_prompt_is_never_exceeded_and_never_wasted(most: int, room: int) -> None:
    words = fit_words(PROMPT, DOCUMENTS, most, count(PROMPT) + room, count)
    shown = put_ahead(PROMPT, write_passages(DOCUMENTS[: len(words)], words))
    assert count(shown) <= count(PROMPT) + room
    assert all(given <= most for given in words)
    whole = [min(most, len(document.text.split())) for document in DOCUMENTS]
    if words != whole:
        # all of the next passage would not have fitted
        more = whole[: len(words) + (words == whole[: len(words)])]
        assert count(put_ahead(PROMPT, write_passages(DOCUMENTS[: len(more)], more))) > count(PROMPT) + room


@pytest.mark.parametrize("words", [[1], [1, 2, 3, 4]])
def test_each_document_needs_its_words(words: list[int]) -> None:
    with pytest.raises(ValueError, match="zip"):
        write_passages(DOCUMENTS, words)
