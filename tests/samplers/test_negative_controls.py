"""Negative controls, on record and label ids."""

from __future__ import annotations

import pytest

from mint_ray.config.loader import UserError
from mint_ray.samplers.negative_controls import is_swapped, permute_labels


def test_a_random_half_of_the_records_is_swapped_by_the_seed() -> None:
    ids = [f"r{number}" for number in range(4000)]
    swapped = [is_swapped(record_id) for record_id in ids]
    assert sum(swapped) / 4000 == pytest.approx(0.5, abs=0.03)
    assert swapped == [is_swapped(record_id) for record_id in ids]
    assert swapped != [is_swapped(record_id, seed=1) for record_id in ids]


def test_no_label_keeps_its_name_and_the_order_of_the_ids_does_not_matter() -> None:
    ids = [f"OMIM:{number}" for number in range(9)]
    permuted = permute_labels(ids)
    assert sorted(permuted) == sorted(permuted.values()) == sorted(ids)
    assert all(old != new for old, new in permuted.items())
    assert permute_labels(ids[::-1]) == permuted


def test_a_single_label_is_refused() -> None:
    with pytest.raises(UserError, match="relabelled needs two labels to exchange, got 1"):
        permute_labels(["OMIM:1"])
