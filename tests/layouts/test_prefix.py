"""The longest common prefix is that of a brute-force search."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mint_ray.layouts.prefix import longest_common_prefix

TOKENS = st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=5)


@given(sequences=TOKENS)
def test_the_prefix_is_the_longest_that_all_sequences_start_with(sequences: list[list[int]]) -> None:
    prefix = longest_common_prefix(sequences)
    assert all(sequence[: len(prefix)] == prefix for sequence in sequences)
    following = {tuple(sequence[len(prefix) : len(prefix) + 1]) for sequence in sequences}
    assert len(following) > 1 or following == {()}


@given(texts=st.lists(st.text(alphabet="ab", max_size=6), min_size=1, max_size=5))
def test_the_prefix_of_texts_is_the_longest_of_all_shared_ones(texts: list[str]) -> None:
    shared = [texts[0][:end] for end in range(len(texts[0]) + 1) if all(t.startswith(texts[0][:end]) for t in texts)]
    assert longest_common_prefix(texts) == shared[-1]


def test_the_sequences_are_not_modified_and_one_sequence_is_its_own_prefix() -> None:
    sequences = [[1, 2, 3], [1, 2]]
    assert longest_common_prefix(sequences) == [1, 2]
    assert sequences == [[1, 2, 3], [1, 2]]
    assert longest_common_prefix([[4, 5]]) == [4, 5]


def test_no_sequence_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty"):
        longest_common_prefix([])
