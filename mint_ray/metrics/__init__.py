"""Metrics of predictions against the truth, the teacher and each other, as pure functions of rows."""

from __future__ import annotations

from mint_ray.metrics.paired import Difference, adjust_holm, compare_pair, permutation_p
from mint_ray.metrics.paper import PAPER_METRICS, measure_as_paper
from mint_ray.metrics.ranking import (
    MAX_K,
    METRICS,
    PER_RECORD_METRICS,
    Estimate,
    LabelCount,
    Resampling,
    Transitions,
    count_label_hits,
    count_top_1_confusions,
    count_transitions,
    effective_k,
    measure,
    measure_runs,
)
from mint_ray.metrics.subgroups import find_subgroups

__all__ = [
    "MAX_K",
    "METRICS",
    "PAPER_METRICS",
    "PER_RECORD_METRICS",
    "Difference",
    "Estimate",
    "LabelCount",
    "Resampling",
    "Transitions",
    "adjust_holm",
    "compare_pair",
    "count_label_hits",
    "count_top_1_confusions",
    "count_transitions",
    "effective_k",
    "find_subgroups",
    "measure",
    "measure_as_paper",
    "measure_runs",
    "permutation_p",
]
