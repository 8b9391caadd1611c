"""Find records of the test split whose text the student has seen in training, word for word or nearly so."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

ROWS_AT_ONCE = 500
"""Held-out texts compared at a time: the similarities to all others are held as one dense block."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leak:
    """A held-out record and the record seen in training whose text is most like its own."""

    record_id: str
    seen_id: str
    similarity: float
    """Cosine of the texts' TF-IDF vectors, 0 to 1."""


def find_nearest(held_out: Mapping[str, str], seen: Mapping[str, str]) -> list[Leak]:
    """For each text of `held_out` (by record_id) the most similar one of `seen`, the most alike first.

    Cosine of TF-IDF vectors of words and of pairs of neighbouring words, weighted over both sides together. A text
    without a word is like no other and left out.
    """
    held_ids, seen_ids = sorted(held_out), sorted(seen)
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+")  # noqa: S106
    if not held_ids or not seen_ids:
        return []
    try:
        vectors = vectorizer.fit_transform([held_out[key] for key in held_ids] + [seen[key] for key in seen_ids])
    except ValueError:
        return []  # not one word in any text
    ours, theirs = vectors[: len(held_ids)], vectors[len(held_ids) :].T.tocsc()
    found = []
    for start in range(0, len(held_ids), ROWS_AT_ONCE):
        similar = np.asarray((ours[start : start + ROWS_AT_ONCE] @ theirs).todense())
        nearest = similar.argmax(axis=1)
        for row, place in enumerate(nearest):
            if ours[start + row].nnz:
                found.append(
                    Leak(
                        record_id=held_ids[start + row],
                        seen_id=seen_ids[place],
                        similarity=min(1.0, float(similar[row, place])),
                    )
                )
    return sorted(found, key=lambda leak: (-leak.similarity, leak.record_id))
