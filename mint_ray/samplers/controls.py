"""The controls of pairs, none of which a student may gain by: preferences swapped by chance, labels renamed."""

from __future__ import annotations

import random
from collections.abc import Sequence

from mint_ray.config.loader import UserError


def is_swapped(record_id: str, seed: int = 0) -> bool:
    """Whether the control `swapped` exchanges chosen and rejected of a record: of half of them, drawn by their ids."""
    return random.Random(f"{seed}:swapped:{record_id}").random() < 0.5


def rename_labels(label_ids: Sequence[str]) -> dict[str, str]:
    """Which label the control `relabelled` puts in the place of each: always the same, and never the label itself.

    Raises UserError if there is only one.
    """
    order = sorted(label_ids)
    if len(order) < 2:
        raise UserError(f"pair.control: relabelled needs two labels to exchange, got {len(order)}")
    random.Random("relabelled").shuffle(order)
    # along one ring through all labels, so that none keeps its name
    return dict(zip(order, [*order[1:], order[0]], strict=True))
