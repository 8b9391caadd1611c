"""Held-out texts that are near-duplicates of texts seen in training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import sklearn
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import pairwise_distances_argmin_min

WORKING_MEMORY_MIB = 64
"""Memory of one block of similarities, in MiB."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NearDuplicate:
    """A held-out record and the training record with the most similar text."""

    record_id: str
    seen_id: str
    """Record that was seen in training."""
    similarity: float
    """Cosine of the TF-IDF vectors of the two texts, 0 to 1."""


def find_most_similar(held_out: Mapping[str, str], seen: Mapping[str, str]) -> list[NearDuplicate]:
    """Return the most similar text of `seen` for each text of `held_out`, the most similar pair first.

    Both map record_id to text. Similarity is the cosine of TF-IDF vectors of words and of pairs of adjacent words,
    weighted over both sides together. Of equally similar texts the first by record_id is returned. A text without
    words is left out.
    """
    if not held_out or not seen:
        return []
    held_ids, seen_ids = sorted(held_out), sorted(seen)
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+")  # noqa: S106
    try:
        vectors = vectorizer.fit_transform([held_out[key] for key in held_ids] + [seen[key] for key in seen_ids])
    except ValueError:
        return []  # no text has a word
    held_vectors, seen_vectors = vectors[: len(held_ids)], vectors[len(held_ids) :]
    with sklearn.config_context(working_memory=WORKING_MEMORY_MIB):
        nearest, distances = pairwise_distances_argmin_min(held_vectors, seen_vectors, metric="cosine")
    has_words = np.diff(held_vectors.indptr) > 0
    found = [
        NearDuplicate(record_id=record_id, seen_id=seen_ids[index], similarity=1.0 - float(distance))
        for record_id, index, distance, known in zip(held_ids, nearest, distances, has_words, strict=True)
        if known
    ]
    return sorted(found, key=lambda match: (-match.similarity, match.record_id))
