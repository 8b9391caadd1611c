"""The numbers that the evaluator released with the paper (arXiv 2505.05736) gives, faults and all, beside ours.

Written from what that evaluator does, so that a table of the paper's can be set against one of ours; nothing is decided
by these numbers here.
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
"""What `measure_as_paper` gives, in its order."""

ALIKE = 0.8
"""Names whose `difflib` ratio is at least this are taken for one."""
REAL = 0.0
"""The same for E1, as released: everything is like everything."""


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
    """E1 to E3, coverage, avoidance and CAR of written answers, as the paper's code has them; none without an answer.

    `truth` gives the records in the order of the test file, `name` the name of a label_id. What is known to be wrong:

    * `paper_e1` ("hallucination-free"): one name must be like a real label at a threshold of 0, which every name is:
      a list of ten words of nonsense passes.
    * `paper_e2` (top 10): a name anywhere in the list, however long, is like the truth at 0.8, so that `Noonan
      syndrome 5` is taken for `Noonan syndrome 1`, and no synonym counts.
    * `paper_e3` (top 1): the same of the first name.
    * `paper_coverage`: share of the first `top` names that are like one of the teacher's first `top`; one name may be
      like a label that is already covered.
    * `paper_avoidance`: share of the teacher's last `bottom` that are not like one of the teacher's first `top`: the
      answer does not come into it.
    * `paper_car`: mean over the records of (1 + w) C A / (w C + A), w being `car_weight`.
    * Records are told apart by their row alone. An empty answer leaves no row, so that all answers behind it are
      judged by the truth of the record before their own, and the last truths by none.
    """
    by_record = {prediction.record_id: prediction for prediction in predictions}
    texts = [by_record[record_id].text for record_id in truth if record_id in by_record]
    written = [text for text in texts if text.strip()]
    if not written:
        return {}
    totals = dict.fromkeys(PAPER_METRICS, 0.0)
    for text, (record_id, label_id) in zip(written, truth.items(), strict=False):
        names = _listed(text)
        parts = [_fold(part.strip()) for part in name[label_id].split(";")]
        ranking = [name[label] for label in teacher.get(record_id, ())]
        likeness = [max(map(_likeness, [said] * len(parts), parts)) for said in names]
        e1 = any(_likeness(said, _fold(real)) >= REAL for said in names[:1] for real in name.values())
        e2 = e1 and max(likeness) >= ALIKE
        e3 = e1 and likeness[0] >= ALIKE
        coverage = _share_alike(names[:top], ranking[:top])
        avoidance = 1 - _share_alike([_fold(label) for label in ranking[-bottom:]], ranking[:top]) if ranking else 0.0
        below = car_weight * coverage + avoidance
        car = (1 + car_weight) * coverage * avoidance / below if below else 0.0
        for metric, value in zip(PAPER_METRICS, (e1, e2, e3, coverage, avoidance, car), strict=True):
            totals[metric] += value
    return {metric: total / len(written) for metric, total in totals.items()}


def _listed(text: str) -> list[str]:
    block = re.search(r"POTENTIAL_DISEASES:\n(.*?)(?:\n\n|\Z)", text, re.DOTALL)
    return [_fold(entry) for entry in re.findall(r"\d+\.\s*([^\n]*)", block[1])] if block else []


def _fold(name: str) -> str:
    return re.sub(r"[^\w\s]", "", name.lower()).strip()


def _likeness(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other).ratio()


def _share_alike(names: Sequence[str], others: Sequence[str]) -> float:
    if not names:
        return 0.0
    return sum(any(_likeness(name, other) >= ALIKE for other in others) for name in names) / len(names)
