"""Settings of retrieval: invalid values and the old key."""

from __future__ import annotations

from typing import Any

import pytest

from mint_ray.config.loader import UserError, from_data
from mint_ray.retrievers.config import Retrieval


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_passages": 0}, "max_passages must be positive, got 0"),
        ({"max_passage_words": 0}, "max_passage_words must be positive, got 0"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens must be positive, got 0"),
        ({"retriever": {"kind": "bm25", "k1": -1.0}}, "k1 must not be negative, got -1.0"),
        ({"retriever": {"kind": "bm25", "b": 2.0}}, "b must lie in 0 to 1, got 2.0"),
        ({"retriever": {"kind": "dense", "model_id": "x", "max_tokens": 0}}, "max_tokens must be positive, got 0"),
        ({"retriever": {"kind": "dense", "model_id": "x", "revision": "main"}}, "revision must be a commit of 40"),
        ({"passages": 3}, "passages: unknown key (got 3); did you mean 'max_passages'?"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        from_data(Retrieval, settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
