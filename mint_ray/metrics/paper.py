"""The metrics of the evaluator released with the paper (arXiv 2505.05736), including its errors, for comparison.

Reimplemented from the behaviour of that evaluator, so that the paper's tables can be compared with ours. Nothing in
this package is decided by these numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher

from mint_ray.records import Prediction

PAPER_METRICS = (
    "paper_e1",
    "paper_e2",
    "paper_e3",
    "paper_coverage",
    "paper_avoidance",
    "paper_car",
)
"""Metrics of `measure_as_paper`, in its order."""

MATCH_THRESHOLD = 0.8
"""`difflib` ratio from which two names count as the same."""
E1_THRESHOLD = 0.0
"""The threshold of E1 as released: every name matches every other."""


def measure_as_paper(
    predictions: Sequence[Prediction],
    *,
    truth: Mapping[str, str],
    teacher: Mapping[str, Sequence[str]],
    name: Mapping[str, str],
    top: int,
    bottom: int,
    car_weight: float = 0.5,
) -> dict[str, float]:
    """Return E1 to E3, coverage, avoidance and CAR of written answers as the paper's code computes them.

    `truth` lists the records in the order of the test file, `name` maps label_id to name. The result is empty if there
    is no answer. Known errors that are reproduced here:

    * `paper_e1` ("hallucination-free"): the first name must match a real label with a ratio of at least 0, which every
      name does: a list of ten nonsense words passes.
    * `paper_e2` (top 10): a name anywhere in the list, however long, matches the truth with a ratio of 0.8, so that
      `Noonan syndrome 5` counts as `Noonan syndrome 1`; synonyms do not count.
    * `paper_e3` (top 1): the same for the first name.
    * `paper_coverage`: share of the first `top` names that match one of the teacher's first `top`; two names may match
      the same label.
    * `paper_avoidance`: share of the teacher's last `bottom` that match none of the teacher's first `top`; independent
      of the answer.
    * `paper_car`: mean over records of (1 + w) C A / (w C + A), where w is `car_weight`.
    * Records are identified by their row number alone. An empty answer is skipped, so every later answer is compared
      with the truth of an earlier record, and the last truths are not used.
    """
    by_record = {prediction.record_id: prediction for prediction in predictions}
    texts = [by_record[record_id].text for record_id in truth if record_id in by_record]
    written = [text for text in texts if text.strip()]
    if not written:
        return {}
    totals = dict.fromkeys(PAPER_METRICS, 0.0)
    for text, (record_id, label_id) in zip(written, truth.items(), strict=False):
        answered = _listed_names(text)
        true_names = [_normalize(part.strip()) for part in name[label_id].split(";")]
        ranking = [name[label] for label in teacher.get(record_id, ())]
        ratios = [max(_ratio(entry, true_name) for true_name in true_names) for entry in answered]
        e1 = any(_ratio(entry, _normalize(label)) >= E1_THRESHOLD for entry in answered[:1] for label in name.values())
        e2 = e1 and max(ratios) >= MATCH_THRESHOLD
        e3 = e1 and ratios[0] >= MATCH_THRESHOLD
        coverage = _share_matched(answered[:top], ranking[:top])
        bottom_names = [_normalize(label) for label in ranking[-bottom:]]
        avoidance = 1 - _share_matched(bottom_names, ranking[:top]) if ranking else 0.0
        denominator = car_weight * coverage + avoidance
        car = (1 + car_weight) * coverage * avoidance / denominator if denominator else 0.0
        for metric, value in zip(PAPER_METRICS, (e1, e2, e3, coverage, avoidance, car), strict=True):
            totals[metric] += value
    return {metric: total / len(written) for metric, total in totals.items()}


def _listed_names(text: str) -> list[str]:
    block = re.search(r"POTENTIAL_DISEASES:\n(.*?)(?:\n\n|\Z)", text, re.DOTALL)
    return [_normalize(entry) for entry in re.findall(r"\d+\.\s*([^\n]*)", block[1])] if block else []


def _normalize(name: str) -> str:
    return re.sub(r"[^\w\s]", "", name.lower()).strip()


def _ratio(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other).ratio()


def _share_matched(names: Sequence[str], others: Sequence[str]) -> float:
    if not names:
        return 0.0
    return sum(any(_ratio(name, other) >= MATCH_THRESHOLD for other in others) for name in names) / len(names)
