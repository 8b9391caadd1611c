"""Dense retrieval: documents by the cosine similarity of sentence embeddings. Importing this loads no torch."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mint_ray.config.loader import UserError
from mint_ray.models import hub
from mint_ray.models.bundled import PREFIX
from mint_ray.models.pretrained import model_identity, resolve_model
from mint_ray.retrievers import Document, Hit
from mint_ray.retrievers.config import Dense

if TYPE_CHECKING:
    from mint_ray.retrievers.sentence_encoder import SentenceEncoder

POOLING = Path("1_Pooling") / "config.json"
"""File in which sentence-transformers states how token embeddings are pooled."""


class DenseRetriever:
    """Exact search over the embeddings of all documents."""

    def __init__(self, config: Dense) -> None:
        self.config = config
        self.ids: list[str] = []

    def inputs(self) -> dict[str, str]:
        """Return the identity of the encoder.

        Raises UserError if it does not exist, or if its embeddings are not means over the tokens.
        """
        model_id, revision = self.config.model_id, self.config.revision
        folder = Path(model_id).expanduser()
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise UserError(f"model_id: {model_id}: no config.json")
        identity = model_identity(self.config, "text")
        if folder.is_dir():
            check_pooling(folder)
        elif not (model_id.startswith(PREFIX) or "://" in model_id or hub.cached_snapshot(model_id, revision)):
            hub.list_files(model_id, revision, "not in the local cache")
        return {"encoder": identity}

    def index(self, documents: Sequence[Document]) -> None:
        """Embed the documents, and load the encoder first."""
        self.ids = [document.document_id for document in documents]
        texts = [f"{document.title}\n{document.text}".strip() for document in documents]
        self.embeddings_DE = np.stack([self._encoder.embed(self.config.document_prefix + text) for text in texts])

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
        """Return the `top_k` documents of each query, best first."""
        return [self._search(query, top_k) for query in queries]

    def _search(self, query: str, top_k: int) -> list[Hit]:
        scores_D = self.embeddings_DE @ self._encoder.embed(self.config.query_prefix + query)
        best = np.argsort(-scores_D, kind="stable")[:top_k]
        return [Hit(document_id=self.ids[i], score=float(scores_D[i])) for i in best]

    def __getstate__(self) -> dict[str, Any]:
        # the weights are not pickled; they are loaded again by the process that unpickles the retriever
        return {key: value for key, value in self.__dict__.items() if key != "_encoder"}

    @functools.cached_property
    def _encoder(self) -> SentenceEncoder:
        from mint_ray.retrievers.sentence_encoder import SentenceEncoder

        model = resolve_model(self.config, "text")
        check_pooling(Path(model.path))
        return SentenceEncoder(model, self.config.max_tokens)


def check_pooling(folder: Path) -> None:
    """Raise UserError if an encoder's folder states another pooling than the mean over tokens."""
    if not (folder / POOLING).is_file():
        return
    settings = json.loads((folder / POOLING).read_text(encoding="utf-8"))
    modes = [name for name, value in settings.items() if name.startswith("pooling_mode") and value and value != "mean"]
    if any(name != "pooling_mode_mean_tokens" for name in modes):
        raise UserError(f"model_id: {folder}: {POOLING} has {', '.join(modes)}; only mean pooling is supported")
