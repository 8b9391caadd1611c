"""Rows of scores that teachers return: a ranking of all labels, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mint_ray.records import Record, TeacherScores


def rank_labels(
    record: Record, teacher: str, labels: Sequence[str], scores: Sequence[float] | NDArray[np.floating]
) -> TeacherScores:
    """Return the labels of a record, best score first; equal scores keep the order of `labels`."""
    order = np.argsort(-np.asarray(scores), kind="stable")
    return TeacherScores(
        record_id=record.record_id, split=record.split, teacher=teacher,
        labels=[labels[i] for i in order], scores=[float(scores[i]) for i in order],
    )  # fmt: skip


def failed_ranking(record: Record, teacher: str, reason: str) -> TeacherScores:
    """Return the row of a record that the teacher cannot score; `reason` is a short name that is counted."""
    return TeacherScores(
        record_id=record.record_id, split=record.split, teacher=teacher,
        labels=[], scores=[], status="failed", reason=reason,
    )  # fmt: skip
