"""Dense retrieval with a tiny encoder, against padded batches of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from mint_ray.config.loader import UserError, from_data
from mint_ray.retrievers.config import Dense
from mint_ray.retrievers.dense import DenseRetriever
from tests.retrievers.conformance import DOCUMENTS, QUERIES
from tests.retrievers.encoder import save_tiny_encoder


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    return save_tiny_encoder(tmp_path / "encoder")


def test_a_score_is_the_cosine_of_mean_pooled_embeddings(encoder: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()

    def pooled(texts: list[str]) -> np.ndarray:
        """Return embeddings as sentence-transformers computes them: a padded batch, without padding in the mean."""
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.no_grad():
            states = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None]
        mean = ((states * mask).sum(1) / mask.sum(1)).numpy()
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    documents = pooled([f"passage: {document.title}\n{document.text}" for document in DOCUMENTS])
    expected = pooled([f"query: {query}" for query in QUERIES]) @ documents.T
    retriever = DenseRetriever(Dense(model_id=str(encoder), query_prefix="query: ", document_prefix="passage: "))
    retriever.index(DOCUMENTS)
    position = {document.document_id: i for i, document in enumerate(DOCUMENTS)}
    for hits, scores in zip(retriever.search(QUERIES, 4), expected, strict=True):
        assert [hit.score for hit in hits] == pytest.approx(sorted(scores, reverse=True), abs=1e-5)
        assert [hit.score for hit in hits] == pytest.approx([scores[position[x.document_id]] for x in hits], abs=1e-5)


def test_text_beyond_max_tokens_is_truncated(encoder: Path) -> None:
    retriever = DenseRetriever(Dense(model_id=str(encoder), max_tokens=8))
    retriever.index(DOCUMENTS)
    assert retriever.search(["seizures " * 8], 4) == retriever.search(["seizures " * 5000], 4)


def test_its_identity_depends_on_the_files_of_the_folder(encoder: Path) -> None:
    def identity() -> dict[str, str]:
        return DenseRetriever(Dense(model_id=str(encoder))).inputs()

    before = identity()
    assert identity() == before
    (encoder / "config.json").write_text((encoder / "config.json").read_text() + "\n")
    assert identity() != before


def test_a_missing_encoder_is_named(tmp_path: Path, encoder: Path) -> None:
    commit = "0123456789" * 4
    cases = {
        "no folder 'someone/encoder'; a model on the Hub needs its commit": {"model_id": "someone/encoder"},
        "someone/encoder: not in the local cache, and": {"model_id": "someone/encoder", "revision": commit},
        "no config.json": {"model_id": str(tmp_path)},
        "is a folder, which has no revisions": {"model_id": str(encoder), "revision": commit},
    }
    for message, settings in cases.items():
        with pytest.raises(UserError) as caught:
            DenseRetriever(from_data(Dense, settings)).inputs()
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_other_weights_than_safetensors_are_refused(encoder: Path) -> None:
    (encoder / "model.safetensors").rename(encoder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no \.safetensors; other formats are not read"):
        DenseRetriever(Dense(model_id=str(encoder))).inputs()


def test_an_encoder_with_another_pooling_is_refused(encoder: Path) -> None:
    (encoder / "1_Pooling").mkdir()
    settings = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (encoder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="has pooling_mode_cls_token; only mean pooling"):
        DenseRetriever(Dense(model_id=str(encoder))).inputs()
    settings |= {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (encoder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    assert DenseRetriever(Dense(model_id=str(encoder))).inputs()
