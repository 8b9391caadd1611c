"""Names of metrics, and formats of numbers, as reports show them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from mint_ray.metrics import METRICS, Difference, Estimate

RESEARCH_USE = "Research use only; not a diagnostic device."

MISSING = "n/a"
"""Text in place of a number that a method does not have."""

METRIC_TITLES = {
    "top_1_accuracy": "Top-1 accuracy",
    "top_k_accuracy": "Top-{k} accuracy",
    "mean_reciprocal_rank": "Mean reciprocal rank",
    "macro_top_1_accuracy": "Macro top-1 accuracy",
    "hallucination_free_accuracy": "Hallucination-free accuracy",
    "hallucination_rate": "Hallucination rate (lower is better)",
    "coverage": "Coverage",
    "avoidance": "Avoidance",
    "car": "CAR",
    "readable": "Readable answers",
    "expected_calibration_error": "Expected calibration error (lower is better)",
    "brier_score": "Brier score (lower is better)",
    "paper_e1": "Paper's E1, hallucination-free",
    "paper_e2": "Paper's E2, top 10",
    "paper_e3": "Paper's E3, top 1",
    "paper_coverage": "Paper's coverage",
    "paper_avoidance": "Paper's avoidance",
    "paper_car": "Paper's CAR",
}
"""Titles of metrics; `{k}` is the k of `Estimate`."""

METRIC_DESCRIPTIONS = {
    "top_1_accuracy": "share of records whose true label is the first name of the answer",
    "top_k_accuracy": "share of records whose true label is among the first {k} names of the answer",
    "mean_reciprocal_rank": "mean of one over the rank of the true label in the answer, 0 if it is not named",
    "macro_top_1_accuracy": "top-1 accuracy of each label, averaged over labels",
    "hallucination_rate": "share of named items that are no label; an answer without a name counts as one such item",
    "hallucination_free_accuracy": "share of answers that were parsed and name only real labels",
    "coverage": "share of the named labels that are at the top of the teacher's ranking",
    "avoidance": "one minus the share of the named labels that are at the bottom of the teacher's ranking",
    "car": "weighted harmonic mean of coverage and avoidance",
    "readable": "share of answers that could be parsed as a list",
    "expected_calibration_error": "mean gap between the probability of the first label and its accuracy",
    "brier_score": "squared distance between the probabilities of all labels and the truth, 0 to 2",
    "paper_e1": "a name matches a real label at a threshold of zero, so any list passes",
    "paper_e2": "a name is 80 % similar to the truth, so another number of the same syndrome passes",
    "paper_e3": "the same for the first name",
    "paper_coverage": "share of the names that are 80 % similar to one at the top of the teacher's ranking",
    "paper_avoidance": "share of the bottom of the teacher's ranking that differs from its top; ignores the answer",
    "paper_car": "coverage and avoidance combined, record by record",
}
"""Definitions of metrics in one phrase."""


def metric_title(metric: str, k: int | None = None) -> str:
    """Return the title of a metric; of an unknown one, its name without underscores."""
    return METRIC_TITLES.get(metric, metric.replace("_", " ")).replace("{k}", str(k or "k"))


def describe_metrics(metrics: Iterable[str], k: int | None = None) -> dict[str, str]:
    """Return title and definition of the metrics that have one."""
    return {
        metric_title(metric, k): METRIC_DESCRIPTIONS[metric].replace("{k}", str(k or "k"))
        for metric in metrics
        if metric in METRIC_DESCRIPTIONS
    }


def order_metrics(estimates: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return every metric that occurs: known ones in the order of METRICS, then others as they come."""
    present = dict.fromkeys(name for found in estimates for name in found)
    return [name for name in METRICS if name in present] + [name for name in present if name not in METRICS]


def find_k(estimates: Iterable[Mapping[str, Estimate]]) -> int | None:
    """Return the k of top-k accuracy; None if there is no such estimate."""
    return next((estimate.k for found in estimates for estimate in found.values() if estimate.k is not None), None)


def format_value(estimate: Estimate | None) -> str:
    """Return a value such as `0.43`, or `n/a`."""
    return MISSING if estimate is None or math.isnan(estimate.value) else f"{estimate.value:.2f}"


def format_interval(estimate: Estimate | None) -> str:
    """Return an interval such as `[0.31, 0.55]`, or an empty string if there is no value."""
    if estimate is None or math.isnan(estimate.value):
        return ""
    return f"[{estimate.low:.2f}, {estimate.high:.2f}]"


def format_level(confidence: float) -> str:
    """Return the level of intervals, such as `95 % interval`."""
    return f"{confidence * 100:g} % interval"


def format_p(p: float) -> str:
    """Return a p-value such as `0.034` or `< 0.001`."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def format_difference(difference: Difference) -> str:
    """Return a difference with its interval, such as `+0.12 [+0.03, +0.21]`."""
    return f"{difference.value:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"


def format_share(share: float | None) -> str:
    """Return a share such as `0.43`, or `n/a`."""
    return MISSING if share is None else f"{share:.2f}"


def format_number(value: float | None) -> str:
    """Return a number with four significant digits, such as `0.4331`, or `n/a`."""
    return MISSING if value is None else f"{value:.4g}"


def format_setting(value: Any) -> str:
    """Return the value of a setting in one line, such as `kind hard, top 3`."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {format_setting(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(format_setting, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_changes(changes: Mapping[str, Any]) -> str:
    """Return changes to a spec in one line, such as `pair.sampler kind hard, top 3; train.student.lora_rank 8`."""
    return "; ".join(f"{path} {format_setting(value)}" for path, value in changes.items())


def format_seconds(seconds: float) -> str:
    """Return a duration in its two largest units, such as `1 h 02 min`, `3 min 12 s` or `0.4 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
