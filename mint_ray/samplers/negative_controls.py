"""Negative controls: changed pairs from which a student must not gain (swapped preferences, permuted labels)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from mint_ray.config.loader import UserError


def is_swapped(record_id: str, seed: int = 0) -> bool:
    """Return whether the control `swapped` exchanges chosen and rejected of a record: a random half of the records."""
    return random.Random(f"{seed}:swapped:{record_id}").random() < 0.5


def permute_labels(label_ids: Sequence[str]) -> dict[str, str]:
    """Return the label that the control `relabelled` substitutes for each: fixed, and never the label itself.

    Raises UserError if there are fewer than two labels.
    """
    order = sorted(label_ids)
    if len(order) < 2:
        raise UserError(f"pair.control: relabelled needs two labels to exchange, got {len(order)}")
    random.Random("relabelled").shuffle(order)
    # a single cycle through all labels, so that none maps to itself
    return dict(zip(order, [*order[1:], order[0]], strict=True))
