"""What a run has to say, as plain data, and how its numbers are written."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from mint_ray.metrics import METRICS, Estimate, Moved
from mint_ray.runtime.goodput import Amount, Goodput

TITLES = {
    "top_1_accuracy": "Top-1 accuracy",
    "top_10_accuracy": "Top-10 accuracy",
    "mean_reciprocal_rank": "Mean reciprocal rank",
    "macro_top_1_accuracy": "Top-1 accuracy, mean over labels",
    "hallucination_free_accuracy": "Hallucination-free accuracy",
    "hallucination_rate": "Hallucination rate (less is better)",
    "coverage": "Coverage",
    "avoidance": "Avoidance",
    "car": "CAR",
    "readable": "Readable answers",
    "expected_calibration_error": "Expected calibration error (less is better)",
    "brier_score": "Brier score (less is better)",
    "paper_e1": "Paper's E1, hallucination-free",
    "paper_e2": "Paper's E2, top 10",
    "paper_e3": "Paper's E3, top 1",
    "paper_coverage": "Paper's coverage",
    "paper_avoidance": "Paper's avoidance",
    "paper_car": "Paper's CAR",
}
"""How a metric is called where people read it."""

MEANINGS = {
    "top_1_accuracy": "the true label is the first name of the answer",
    "top_10_accuracy": "the true label is among the first ten names",
    "mean_reciprocal_rank": "one over the place of the true label, zero where it is not named",
    "macro_top_1_accuracy": "top-1 accuracy of each label by itself, then the mean over labels",
    "hallucination_rate": "share of all named items that are no label; an answer without a name counts as one of them",
    "hallucination_free_accuracy": "the answer was read and every name in it is a real label",
    "coverage": "share of the named labels that stand at the top of the teacher's ranking",
    "avoidance": "one minus the share of the named labels that stand at its bottom",
    "car": "coverage and avoidance in one number, their weighted harmonic mean",
    "readable": "share of the answers that could be read as a list",
    "expected_calibration_error": "how far the probability of the first label lies from how often it is right",
    "brier_score": "squared distance between the probabilities of all labels and the truth, 0 to 2",
    "paper_e1": "one name is like a real label at a threshold of zero: any list passes",
    "paper_e2": "a name is 80 % like the truth, so that another number of one syndrome passes",
    "paper_e3": "the same of the first name",
    "paper_coverage": "share of the names that are 80 % like one at the top of the teacher's ranking",
    "paper_avoidance": "share of the bottom of the teacher's ranking that is unlike its top; the answer plays no part",
    "paper_car": "coverage and avoidance in one number, record by record",
}
"""What a metric measures, to finish the sentence that its title begins."""

RESEARCH_USE = "Research use only; not a diagnostic device."

NOTHING = "n/a"
"""Stands where a method has no such metric."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelHits:
    """How often one true label was among the first ten names, before and after alignment."""

    name: str
    n: int
    """Records whose truth it is."""
    base: int
    aligned: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One record as the student saw it, and what it said before and after alignment."""

    record_id: str
    prompt: str
    truth: str
    base: str
    aligned: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSummary:
    """Everything that a report of one run shows; `loading.dump` and `loading.from_data` carry it through JSON."""

    title: str
    methods: dict[str, dict[str, Estimate]]
    """Method to metric to estimate, in the order in which they are shown."""
    confidence: float = 0.95
    """Of the intervals in `methods`."""
    counts: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    """Stage to what was counted there, such as records per split."""
    dropped: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    """Stage to reason to rows dropped."""
    log_history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """The log rows of the Hugging Face Trainer: `step` with `loss`, `log_odds_ratio`, `eval_loss` and so on."""
    per_label: list[LabelHits] = dataclasses.field(default_factory=list)
    moved: Moved | None = None
    """Records by base right or wrong and aligned right or wrong."""
    examples: list[Example] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    """What a reader must know to read the numbers rightly."""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """Stage to wall-clock seconds."""
    goodput: dict[str, Goodput] = dataclasses.field(default_factory=dict)
    """Stage to what its workers held, and what came of it."""
    artifacts: dict[str, str] = dataclasses.field(default_factory=dict)
    """Stage to the URI of what it left behind."""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The resolved spec of the run."""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def metrics(self) -> list[str]:
        """Every metric that some method has: the known ones in their order, then others as they come."""
        present = dict.fromkeys(name for estimates in self.methods.values() for name in estimates)
        return [name for name in METRICS if name in present] + [name for name in present if name not in METRICS]

    @property
    def interval(self) -> str:
        """What the brackets hold, such as `95 % interval`."""
        return f"{self.confidence * 100:g} % interval"


def title_of(metric: str) -> str:
    """A metric's name for readers; an unknown one has its underscores taken out."""
    return TITLES.get(metric, metric.replace("_", " "))


def show_value(estimate: Estimate | None) -> str:
    """`0.43`, or `n/a` where there is no number."""
    return NOTHING if estimate is None or math.isnan(estimate.value) else f"{estimate.value:.2f}"


def show_interval(estimate: Estimate | None) -> str:
    """`[0.31, 0.55]`, or nothing where there is no number."""
    return "" if show_value(estimate) == NOTHING or estimate is None else f"[{estimate.low:.2f}, {estimate.high:.2f}]"


def show(estimate: Estimate | None) -> str:
    """`0.43 [0.31, 0.55]`, or `n/a` where there is no number."""
    return f"{show_value(estimate)} {show_interval(estimate)}".rstrip()


GOODPUT_HEADINGS = ("stage", "attempts", "wall clock", "waited", "rented", "start-up", "work", "redone", "idle")
GOODPUT_MEANING = (
    "Rented is what workers reserved while they held it, in processor or GPU seconds, over all attempts at what the "
    "run is made of, by any run; work ended in an artifact, redone was lost with a worker, a machine or a driver. "
    "Waited: nothing of what was asked for was there yet. The driver and machines that nobody held are not counted."
)


def goodput_rows(goodput: dict[str, Goodput]) -> list[list[str]]:
    """A row for each stage that rented something, and one for all, in the columns of `GOODPUT_HEADINGS`."""
    rented = {stage: spent for stage, spent in goodput.items() if spent.rented != Amount()}
    if len(rented) > 1:
        rented["together"] = sum(rented.values(), Goodput())
    rows = []
    for stage, spent in rented.items():
        amounts = [spent.rented, spent.startup, spent.work, spent.redone, spent.idle]
        times = [show_seconds(spent.wall_seconds), show_seconds(spent.waited_seconds)]
        processors = [f"{amount.cpu_seconds:,.0f}" for amount in amounts]
        rows.append([stage, f"{spent.attempts:,}", *times, *processors])
        if spent.rented.gpu_seconds:
            rows.append([f"{stage}, GPUs", "", "", "", *(f"{amount.gpu_seconds:,.0f}" for amount in amounts)])
    return rows


def goodput_line(goodput: dict[str, Goodput]) -> str:
    """What of everything that was rented came to be of use, and why the rest did not; empty if nothing was rented."""
    total = sum(goodput.values(), Goodput())
    lines = []
    for unit, name in (("cpu_seconds", "processor"), ("gpu_seconds", "GPU")):
        whole = getattr(total.rented, unit)
        if whole:
            shares = [
                f"{getattr(amount, unit) / whole:.0%} {word}"
                for word, amount in (
                    ("work", total.work),
                    ("start-up", total.startup),
                    ("redone", total.redone),
                    ("idle", total.idle),
                )
            ]
            lines.append(f"{whole:,.0f} {name} seconds, {', '.join(shares)}")
    return "; ".join([*lines, f"{show_seconds(total.waited_seconds)} waited for resources"]) if lines else ""


def show_seconds(seconds: float) -> str:
    """A duration in its two largest units, such as `1 h 02 min`, `3 min 12 s` or `0.4 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
