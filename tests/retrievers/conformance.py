"""Checks that every retriever must pass; `test_conformance.py` runs them on each."""

from __future__ import annotations

import pickle

from mint_ray.retrievers import Document, Retriever

TEXTS = {
    "marfan": ("Marfan syndrome", "Arachnodactyly, ectopia lentis and dilatation of the aorta."),
    "noonan": ("Noonan syndrome", "Short stature, pulmonic stenosis and a webbed neck."),
    "rett": ("Rett syndrome", "Seizures, loss of speech, stereotypic movements of the hands; short stature."),
    "twin": ("Rett syndrome", "Seizures, loss of speech, stereotypic movements of the hands; short stature."),
}
DOCUMENTS = [Document(document_id=key, title=title, text=text) for key, (title, text) in TEXTS.items()]
QUERIES = [
    "A boy with arachnodactyly and ectopia lentis.",
    "A girl with seizures, who lost her speech.",
    "Short stature.",
    "A woman with a webbed neck, short stature, seizures and pulmonic stenosis. " * 4,
]


def check_retriever(retriever: Retriever) -> None:
    """Assert the interface of a retriever that has indexed DOCUMENTS."""
    results = retriever.search(QUERIES, 3)
    for hits in results:
        ids, scores = [hit.document_id for hit in hits], [hit.score for hit in hits]
        assert 0 < len(ids) == len(set(ids)) <= 3
        assert set(ids) <= set(TEXTS)
        assert scores == sorted(scores, reverse=True)
    assert [retriever.search([query], 3)[0] for query in QUERIES] == results, "the batch does not matter"
    assert retriever.search(QUERIES[::-1], 3) == results[::-1]
    assert [hits[:1] for hits in retriever.search(QUERIES, 4)] == retriever.search(QUERIES, 1)
    title, text = TEXTS["rett"]
    first, second = retriever.search([f"{title}\n{text}"], 2)[0]
    assert (first.document_id, second.document_id) == ("rett", "twin"), "equal scores are in the order of the documents"
    assert first.score == second.score
    assert pickle.loads(pickle.dumps(retriever)).search(QUERIES, 3) == results  # noqa: S301
    assert retriever.inputs()
    assert all(retriever.inputs().values())
