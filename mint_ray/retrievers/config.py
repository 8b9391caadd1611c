"""Settings of retrieval: the documents, how they are searched, and the passages that a student reads."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from mint_ray.config.loader import settings


@settings
class Profiles:
    """One document per label: its name and its annotated findings, most frequent first."""

    kind: Literal["profiles"] = "profiles"


@settings
class Table:
    """Documents of a file. They are not split, so split long ones into passages beforehand."""

    kind: Literal["table"] = "table"
    uri: str
    """Parquet, CSV or JSONL with the columns `document_id` and `text`, and optionally `title` and `label_id` (the label
    that a document is about, which is used for recall only)."""


AnyDocuments = Annotated[Profiles | Table, Field(discriminator="kind")]
"""Settings of `documents`, selected by `kind`."""


@settings
class Bm25:
    """Okapi BM25 (Lucene's variant): shared words, weighted by their rarity."""

    kind: Literal["bm25"] = "bm25"
    k1: float = 1.5
    """Saturation of term frequency: larger values give repeated words more weight."""
    b: float = 0.75
    """Normalization by document length: 0 none, 1 full."""

    def __post_init__(self) -> None:
        if self.k1 < 0:
            raise ValueError(f"k1 must not be negative, got {self.k1}")
        if not 0 <= self.b <= 1:
            raise ValueError(f"b must lie in 0 to 1, got {self.b}")


@settings
class Dense:
    """Cosine similarity of sentence embeddings, which are means over the tokens of a text."""

    kind: Literal["dense"] = "dense"
    model_id: str
    """Sentence encoder: bundled, such as `bundled:all-minilm-l6-v2`, a folder in safetensors with its tokenizer, or an
    id on the Hugging Face Hub."""
    revision: str | None = None
    """Commit of an encoder on the Hub, 40 hexadecimal digits; null for a folder."""
    max_tokens: int = 256
    """Maximum number of tokens of a text; the rest is truncated."""
    query_prefix: str = ""
    """Text that the encoder expects before a query, such as `query: `."""
    document_prefix: str = ""
    """Text that the encoder expects before a document."""

    def __post_init__(self) -> None:
        if self.revision is not None and not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ValueError(f"revision must be a commit of 40 hexadecimal digits, got {self.revision!r}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be positive, got {self.max_tokens}")


AnyRetriever = Annotated[Bm25 | Dense, Field(discriminator="kind")]
"""Settings of `retriever`, selected by `kind`."""


@settings
class Retrieval:
    """Retrieval of passages that the student reads ahead of each note; the note is the query."""

    renamed_keys: ClassVar[dict[str, str]] = {"passages": "max_passages"}

    documents: AnyDocuments = Profiles()
    retriever: AnyRetriever = Bm25()
    max_passages: int = 3
    """Maximum number of documents retrieved for each record."""
    max_passage_words: int = 100
    """Maximum number of words of each passage; the rest is truncated."""
    max_prompt_tokens: int | None = None
    """Maximum number of tokens of the prompt with its passages; null: the student's context length without the answer.
    Passages are truncated to fit, the last one first; the note is never truncated."""
    adaptive: bool = False
    """Use only passages that increase the student's confidence in its answer (`mint_ray.retrievers.adaptive`); this
    ranks all labels up to `max_passages` + 1 times per record."""

    def __post_init__(self) -> None:
        for name in ("max_passages", "max_passage_words"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise ValueError(f"max_prompt_tokens must be positive, got {self.max_prompt_tokens}")
