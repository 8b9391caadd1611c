"""Settings of retrieval: which documents there are, how they are searched, and what the student is shown of them."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field

from mint_ray.config.loader import settings


@settings
class Profiles:
    """One document a label: its name and its annotated findings, most frequent first."""

    kind: Literal["profiles"] = "profiles"


@settings
class Table:
    """Documents that someone else wrote; none is split, so a file of long ones is better cut into passages first."""

    kind: Literal["table"] = "table"
    uri: str
    """Parquet, CSV or JSONL with the columns `document_id` and `text`, and where there are any `title` and `label_id`
    (the label that a document is about; recall is counted with it, and nothing else reads it)."""


AnyDocuments = Annotated[Profiles | Table, Field(discriminator="kind")]


@settings
class Bm25:
    """By shared words, rare ones counting most (Lucene's form of BM25)."""

    kind: Literal["bm25"] = "bm25"
    k1: float = 1.5
    """How slowly a word's repetition stops to count."""
    b: float = 0.75
    """How much long documents are held back: 0 not at all, 1 in full."""

    def __post_init__(self) -> None:
        if self.k1 < 0:
            raise ValueError(f"k1 must not be negative, got {self.k1}")
        if not 0 <= self.b <= 1:
            raise ValueError(f"b must lie in 0 to 1, got {self.b}")


@settings
class Dense:
    """By the cosine between sentence embeddings, each the mean over the tokens of a text."""

    kind: Literal["dense"] = "dense"
    model_id: str
    """Sentence encoder: a bundled one such as `bundled:all-minilm-l6-v2`, a folder in safetensors with its tokenizer,
    or an id on the Hugging Face Hub."""
    revision: str | None = None
    """Commit of an encoder of the Hub, all 40 digits; none for a folder."""
    max_tokens: int = 256
    """What of a text is embedded: its first so many tokens."""
    query_prefix: str = ""
    """What the encoder wants ahead of a query, such as `query: `."""
    document_prefix: str = ""
    """What it wants ahead of a document."""

    def __post_init__(self) -> None:
        if self.revision is not None and not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ValueError(f"revision must be a commit of 40 hexadecimal digits, got {self.revision!r}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be positive, got {self.max_tokens}")


AnyRetriever = Annotated[Bm25 | Dense, Field(discriminator="kind")]


@settings
class Retrieval:
    """What a student is given to read ahead of each note; the note itself is what is searched with."""

    documents: AnyDocuments = Profiles()
    retriever: AnyRetriever = Bm25()
    passages: int = 3
    """Documents found for each record, at most."""
    max_passage_words: int = 100
    """Words shown of each; what comes behind them is cut."""
    max_prompt_tokens: int | None = None
    """Longest prompt with its passages, in the student's tokens; null: what its context has beside the answer. Where it
    would be longer, passages are cut, the last one first, and never the note."""
    adaptive: bool = False
    """Show only passages with which the student is surer of its answer than without (`mint_ray.retrievers.adaptive`);
    asks it for the likelihood of every label up to `passages` + 1 times a record."""

    def __post_init__(self) -> None:
        for name in ("passages", "max_passage_words"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise ValueError(f"max_prompt_tokens must be positive, got {self.max_prompt_tokens}")
