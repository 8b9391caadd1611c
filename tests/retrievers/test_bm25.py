"""BM25, against scores computed by hand."""

from __future__ import annotations

import math

import pytest

from mint_ray.config.loader import UserError
from mint_ray.retrievers import Document
from mint_ray.retrievers.bm25 import Bm25Retriever
from mint_ray.retrievers.config import Bm25

CORPUS = [
    "seizures seizures ataxia",
    "seizures cataract deafness obesity myopia",
    "cataract myopia",
    "scoliosis",
]


def indexed(texts: list[str], **settings: float) -> Bm25Retriever:
    retriever = Bm25Retriever(Bm25(**settings))
    retriever.index([Document(document_id=str(i), title="", text=text) for i, text in enumerate(texts)])
    return retriever


def by_hand(words: list[str], k1: float, b: float) -> list[float]:
    """Return scores by the formula of Lucene's BM25 in Kamphuis et al. (ECIR 2020)."""
    corpus = [text.split() for text in CORPUS]
    mean = sum(map(len, corpus)) / len(corpus)
    scores = []
    for document in corpus:
        score = 0.0
        for word in words:
            frequency = sum(word in other for other in corpus)
            idf = math.log(1 + (len(corpus) - frequency + 0.5) / (frequency + 0.5))
            count = document.count(word)
            score += idf * count / (count + k1 * (1 - b + b * len(document) / mean))
        scores.append(score)
    return scores


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.5, 0.0), (2.0, 1.0)])
@pytest.mark.parametrize("query", ["seizures", "Myopia, cataract and seizures!", "ataxia of the seizures obesity"])
def test_scores_and_ranks_equal_a_hand_computation(query: str, k1: float, b: float) -> None:
    words = [word for word in ("seizures", "myopia", "cataract", "ataxia", "obesity") if word in query.lower()]
    expected = by_hand(words, k1, b)
    hits = indexed(CORPUS, k1=k1, b=b).search([query], 4)[0]
    order = sorted((i for i in range(4) if expected[i] > 0), key=lambda i: -expected[i])
    assert [hit.document_id for hit in hits] == [str(i) for i in order]
    assert [hit.score for hit in hits] == pytest.approx([expected[i] for i in order], rel=1e-5)


def test_a_query_that_shares_no_word_finds_nothing() -> None:
    assert indexed(CORPUS).search(["hypertelorism", "", "a, of and the"], 4) == [[], [], []]


def test_documents_without_a_word_are_refused() -> None:
    with pytest.raises(UserError, match="none of 2 contains a word"):
        indexed(["1 2", "a"])
