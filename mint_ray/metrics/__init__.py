"""Measure predictions: against the truth, against the teacher, against each other; pure functions of rows."""

from __future__ import annotations

from mint_ray.metrics.paired import PAIRED, Difference, adjust_holm, compare_pair, permutation_p
from mint_ray.metrics.paper import PAPER_METRICS, measure_as_paper
from mint_ray.metrics.ranking import (
    LOWER_IS_BETTER,
    METRICS,
    Estimate,
    LabelCount,
    Moved,
    count_confused,
    measure,
    measure_runs,
    moved,
    per_label,
)
from mint_ray.metrics.subgroups import strata

__all__ = [
    "LOWER_IS_BETTER",
    "METRICS",
    "PAIRED",
    "PAPER_METRICS",
    "Difference",
    "Estimate",
    "LabelCount",
    "Moved",
    "adjust_holm",
    "compare_pair",
    "count_confused",
    "measure",
    "measure_as_paper",
    "measure_runs",
    "moved",
    "per_label",
    "permutation_p",
    "strata",
]
