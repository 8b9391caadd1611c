"""The longest common prefix of token sequences or texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Text = TypeVar("Text", str, list[int])


def longest_common_prefix(sequences: Sequence[Text]) -> Text:
    """Return the longest prefix that all `sequences` share: characters of strings, tokens of lists.

    Takes time proportional to the total length. Raises ValueError if there is no sequence.
    """
    first, last = min(sequences), max(sequences)  # what the lexicographically first and last share, all share
    for index, (one, other) in enumerate(zip(first, last, strict=False)):
        if one != other:
            return first[:index]
    return first
