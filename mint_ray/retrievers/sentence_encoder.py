"""A sentence encoder on its device: one embedding per text.

Tested by tests/retrievers/test_dense.py.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from mint_ray.models.pretrained import PretrainedModel

Embedding = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


class SentenceEncoder:
    """Mean pooling over tokens (Reimers and Gurevych, EMNLP 2019), normalized to length 1."""

    def __init__(self, model: PretrainedModel, max_tokens: int) -> None:
        options = {"revision": model.revision, "trust_remote_code": False}
        self.tokenizer = AutoTokenizer.from_pretrained(model.path, **options)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        encoder = AutoModel.from_pretrained(model.path, use_safetensors=True, dtype=torch.float32, **options)
        self.model = encoder.to(self.device).eval()
        self.max_tokens = min(max_tokens, getattr(encoder.config, "max_position_embeddings", max_tokens))

    @torch.inference_mode()
    def embed(self, text: str) -> Embedding:
        """Return the embedding of one text, shape (E,).

        Texts are embedded one by one: in a batch, padding would change the last digits and with them the ranking.
        """
        tokens = self.tokenizer(text, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        states_TE = self.model(**tokens.to(self.device)).last_hidden_state[0]
        embedding: Embedding = torch.nn.functional.normalize(states_TE.float().mean(dim=0), dim=0).cpu().numpy()
        return embedding
