"""Passages ahead of a note: rows, format, truncation to the prompt length, recall."""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence

from mint_ray.records import Message, Record
from mint_ray.retrievers import Document

HEADING = "Passages from reference works, best match first. They may be about other cases."
CASE = "The case to answer:"

MIN_WORDS = 5
"""Minimum number of words of a truncated passage; a shorter one is dropped."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Retrieved:
    """The documents retrieved for one record, best first."""

    record_id: str
    documents: list[Document]
    scores: list[float]
    """The retriever's score of each document, descending."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ChosenPassages:
    """Passages that one student reads ahead of one record's note."""

    record_id: str
    document_ids: list[str]
    """Documents of the passages, in order."""
    scores: list[float]
    """The retriever's score of each passage."""
    words: list[int]
    """Number of words of each passage."""
    skipped: list[str]
    """Retrieved documents without a passage: they do not fit, or the student was not more confident with them."""
    truncated: bool
    """True if a passage is shorter than `max_passage_words` allows because the prompt is limited."""
    confidence: list[float]
    """Adaptive: the student's confidence without passages, then with each passage tried (`retrievers.adaptive`)."""
    text: str
    """Text that is put ahead of the prompt's last message; empty for no passage."""


def format_passages(documents: Sequence[Document], words: Sequence[int]) -> str:
    """Return the first `words[i]` words of each document i, numbered and titled; "" for no documents."""
    passages = []
    for number, (document, limit) in enumerate(zip(documents, words, strict=True), start=1):
        text = document.text.split()
        ellipsis = " ..." if limit < len(text) else ""
        passages.append(f"[{number}] {document.title}".rstrip() + f"\n{' '.join(text[:limit])}{ellipsis}")
    return "\n\n".join([HEADING, *passages, CASE]) if passages else ""


def prepend_passages(prompt: Sequence[Message], passages: str) -> list[Message]:
    """Return the conversation with `passages` at the start of its last message, which is otherwise unchanged."""
    if not passages:
        return list(prompt)
    *before, last = prompt
    return [*before, dataclasses.replace(last, content=f"{passages}\n\n{last.content}")]


def allocate_words(
    prompt: Sequence[Message],
    documents: Sequence[Document],
    max_passage_words: int,
    max_tokens: int,
    count_tokens: Callable[[Sequence[Message]], int],
) -> list[int]:
    """Return the number of words of each passage, so that the prompt has at most `max_tokens` tokens.

    Words are allocated to the documents in order: the last passage is truncated first, and dropped below MIN_WORDS. The
    list is as long as the number of passages that fit; it may be empty. The prompt without passages is not checked.
    """
    lengths = [min(len(document.text.split()), max_passage_words) for document in documents]

    def tokens(total: int) -> int:
        words = _allocate(lengths, total)
        return count_tokens(prepend_passages(prompt, format_passages(documents[: len(words)], words)))

    total = sum(lengths)
    if tokens(total) > max_tokens:
        total = bisect_right(range(total), max_tokens, key=tokens) - 1
        # a longer text may have fewer tokens, rarely; the search may then have ended slightly too high
        while total > 0 and tokens(total) > max_tokens:
            total -= 1
    return _allocate(lengths, max(total, 0))


def _allocate(lengths: Sequence[int], total: int) -> list[int]:
    """Return `total` words allocated to passages of these lengths in order, each completely before the next."""
    words: list[int] = []
    for length in lengths:
        allocated = min(length, total)
        if allocated < min(length, MIN_WORDS) or allocated == 0:
            break
        words.append(allocated)
        total -= allocated
    return words


def measure_recall(
    records: Sequence[Record], documents: Sequence[Document], found: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Return `recall`, the share of records with a document of their true label among those `found`, and `records`.

    Records whose label has no document at all are not counted; the result is empty if no record counts. This is the
    only use of the true label, after everything was chosen.
    """
    label_of = {document.document_id: document.label_id for document in documents}
    known = set(label_of.values()) - {None}
    counted = [record for record in records if record.label_id in known]
    if not counted:
        return {}
    hits = sum(any(label_of[i] == record.label_id for i in found[record.record_id]) for record in counted)
    return {"recall": round(hits / len(counted), 4), "records": len(counted)}
