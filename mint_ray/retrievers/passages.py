"""Write passages ahead of a note, cut to what fits, the note never."""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Callable, Sequence

from mint_ray.records import Message
from mint_ray.retrievers import Document

HEADING = "Passages from reference works, best match first. They may be about other cases."
CASE = "The case to answer:"

LEAST_WORDS = 5
"""A passage of which less would be left is not shown."""


def write_passages(documents: Sequence[Document], words: Sequence[int]) -> str:
    """The first `words` words of each document, numbered and titled; empty where there is none."""
    shown = []
    for number, (document, most) in enumerate(zip(documents, words, strict=True), start=1):
        text = document.text.split()
        ellipsis = " ..." if most < len(text) else ""
        shown.append(f"[{number}] {document.title}".rstrip() + f"\n{' '.join(text[:most])}{ellipsis}")
    return "\n\n".join([HEADING, *shown, CASE]) if shown else ""


def put_ahead(prompt: Sequence[Message], passages: str) -> list[Message]:
    """The conversation with `passages` ahead of its last message, which stays word for word as it is."""
    if not passages:
        return list(prompt)
    *before, last = prompt
    return [*before, dataclasses.replace(last, content=f"{passages}\n\n{last.content}")]


def fit_words(
    prompt: Sequence[Message],
    documents: Sequence[Document],
    max_passage_words: int,
    max_tokens: int,
    count_tokens: Callable[[Sequence[Message]], int],
) -> list[int]:
    """How many words of each of the first documents can be shown, so that the prompt has at most `max_tokens` tokens.

    Words go to the documents in order: the last passage is cut first, and is gone when too little of it would be left.
    Not even one may fit, in which case the list is empty; whether the bare prompt fits is the caller's business.
    """
    whole = [min(len(document.text.split()), max_passage_words) for document in documents]

    def tokens(total: int) -> int:
        words = _deal(whole, total)
        return count_tokens(put_ahead(prompt, write_passages(documents[: len(words)], words)))

    total = sum(whole)
    if tokens(total) > max_tokens:
        total = bisect_right(range(total), max_tokens, key=tokens) - 1
        # a word more is a token more almost always; where it is not, the search may have ended a little too high
        while total > 0 and tokens(total) > max_tokens:
            total -= 1
    return _deal(whole, max(total, 0))


def _deal(whole: Sequence[int], total: int) -> list[int]:
    """`total` words dealt out in order, each passage whole before the next has any."""
    words: list[int] = []
    for most in whole:
        given = min(most, total)
        if given < min(most, LEAST_WORDS) or given == 0:
            break
        words.append(given)
        total -= given
    return words
