"""Find documents by the cosine between sentence embeddings."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from mint_ray.config.loader import UserError
from mint_ray.models.bundled import PREFIX
from mint_ray.models.pretrained import identity_of, place_of
from mint_ray.retrievers import Document, Hit
from mint_ray.retrievers.config import Dense

Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]

POOLING = Path("1_Pooling") / "config.json"
"""Where a folder of sentence-transformers says how tokens become one embedding."""


class DenseRetriever:
    """Texts are embedded one by one: what a neighbour's padding changes in the last digits would change who is first.

    Mean pooling over tokens: Reimers and Gurevych, EMNLP 2019.
    """

    def __init__(self, config: Dense) -> None:
        self.config = config
        self.ids: list[str] = []

    def inputs(self) -> dict[str, str]:
        """What the encoder is. Raises UserError if it cannot be had, or is not one of mean pooling."""
        model_id, revision = self.config.model_id, self.config.revision
        folder = Path(model_id).expanduser()
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise UserError(f"model_id: {model_id}: no config.json")
        identity = identity_of(model_id, revision, "text")
        if folder.is_dir():
            _check_pooling(folder)
        elif not model_id.startswith(PREFIX):
            _check_hub(model_id, revision)
        return {"encoder": identity}

    def index(self, documents: Sequence[Document]) -> None:
        self.ids = [document.document_id for document in documents]
        texts = [f"{document.title}\n{document.text}".strip() for document in documents]
        self.embeddings_DE = np.stack([self._embed(self.config.document_prefix + text) for text in texts])

    def search(self, queries: Sequence[str], most: int) -> list[list[Hit]]:
        return [self._search(query, most) for query in queries]

    def _search(self, query: str, most: int) -> list[Hit]:
        scores_D = self.embeddings_DE @ self._embed(self.config.query_prefix + query)
        best = np.argsort(-scores_D, kind="stable")[:most]
        return [Hit(document_id=self.ids[i], score=float(scores_D[i])) for i in best]

    @torch.inference_mode()
    def _embed(self, text: str) -> Array:
        """The mean of the last layer over all tokens, of length 1."""
        tokens = self._tokenizer(text, truncation=True, max_length=self._longest, return_tensors="pt")
        states_TE = self._model(**tokens.to(self._model.device)).last_hidden_state[0]
        embedding: Array = torch.nn.functional.normalize(states_TE.float().mean(dim=0), dim=0).cpu().numpy()
        return embedding

    def __getstate__(self) -> dict[str, Any]:
        # weights are read again where it arrives
        return {key: value for key, value in self.__dict__.items() if key not in ("_model", "_tokenizer", "_longest")}

    @functools.cached_property
    def _longest(self) -> int:
        limit: int = getattr(self._model.config, "max_position_embeddings", self.config.max_tokens)
        return min(self.config.max_tokens, limit)

    @functools.cached_property
    def _tokenizer(self) -> Any:
        place = place_of(self.config.model_id, "text")
        return AutoTokenizer.from_pretrained(place, revision=self.config.revision, trust_remote_code=False)

    @functools.cached_property
    def _model(self) -> Any:
        model = AutoModel.from_pretrained(
            place_of(self.config.model_id, "text"),
            revision=self.config.revision,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
        )
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _check_hub(model_id: str, revision: str | None) -> None:
    try:
        AutoConfig.from_pretrained(model_id, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model_id: {model_id}: cannot be had from the Hub: {reason}") from error


def _check_pooling(folder: Path) -> None:
    """Raise UserError if the encoder says that its embedding is anything but the mean over tokens."""
    if not (folder / POOLING).is_file():
        return
    said = json.loads((folder / POOLING).read_text(encoding="utf-8"))
    modes = [name for name, value in said.items() if name.startswith("pooling_mode") and value and value != "mean"]
    if any(name != "pooling_mode_mean_tokens" for name in modes):
        raise UserError(f"model_id: {folder}: {POOLING} asks for {', '.join(modes)}; only the mean over tokens is done")
