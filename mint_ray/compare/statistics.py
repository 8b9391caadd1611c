"""Hold the truth of the held-out records against what methods answered: estimates, paired tests, confusions."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mint_ray.config.comparison import ComparisonConfig
from mint_ray.metrics import (
    adjust_holm,
    compare_pair,
    count_confused,
    measure_as_paper,
    measure_runs,
    strata,
)
from mint_ray.records import Label, Prediction, Record
from mint_ray.reports.comparison import Confusion, PairedTest

CONFUSED = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """The predictions of one row of the table, one list for each run."""

    runs: list[list[Prediction]]
    decoding: str
    """What the name of the answers has behind the student's, such as `, ranked`: only like is tested against like."""


class Judge:
    """Holds the truth of the test records, and measures and tests methods by it."""

    def __init__(self, config: ComparisonConfig, labels: Sequence[Label], records: Sequence[Record]) -> None:
        held_out = [record for record in records if record.split == "test"]
        self.settings, self.sampler = config.evaluate, config.pair.sampler
        self.name = {label.label_id: label.name for label in labels}
        self.truth = {record.record_id: record.label_id or "" for record in held_out}
        self.group = {record.record_id: record.group_id for record in held_out}
        trained = Counter(record.label_id or "" for record in records if record.split == "train")
        self.parts = strata(held_out, {label.label_id: trained[label.label_id] for label in labels})

    def judge(self, runs: Sequence[Sequence[Prediction]], rankings: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """Of one method: `estimates`, `strata`, `paper` and `unread` of its row."""
        settings, sampler = self.settings, self.sampler
        lists = {"top": sampler.top, "bottom": sampler.rejected_length}
        paper = [
            measure_as_paper(predictions, truth=self.truth, teacher=rankings, name=self.name, **lists)
            for predictions in runs
        ]

        def measured(truth: Mapping[str, str]) -> dict[str, Any]:
            return dict(
                measure_runs(
                    runs,
                    truth=truth,
                    teacher=rankings,
                    group=self.group,
                    **lists,
                    resamples=settings.resamples,
                    confidence=settings.confidence,
                    seed=settings.seed,
                )
            )

        return {
            "estimates": measured(self.truth),
            "strata": {
                part: measured({key: self.truth[key] for key in sorted(members)})["top_1_accuracy"]
                for part, members in self.parts.items()
            },
            "paper": {
                metric: statistics.fmean(found[metric] for found in paper)
                for metric in (paper[0] if all(paper) else {})
            },
            "unread": dict(Counter(row.reason for predictions in runs for row in predictions if row.reason)),
        }

    def test(self, answers: Mapping[str, Answers], metric: str, reference: str | None) -> list[PairedTest]:
        """The reference against every other method, or each against each; p with Holm's correction."""
        names = list(answers)
        pairs = [
            (first, second)
            for first in names
            for second in names
            if first != second
            and answers[first].decoding == answers[second].decoding
            and (
                first == f"{reference}{answers[first].decoding}"
                if reference
                else names.index(first) > names.index(second)
            )
        ]
        found = [
            compare_pair(
                answers[first].runs,
                answers[second].runs,
                metric=metric,
                top=self.sampler.top,
                truth=self.truth,
                group=self.group,
                resamples=self.settings.resamples,
                confidence=self.settings.confidence,
                seed=self.settings.seed,
            )
            for first, second in pairs
        ]
        adjusted = adjust_holm([difference.p for difference in found])
        return [
            PairedTest(first=first, second=second, difference=difference, adjusted=p)
            for (first, second), difference, p in zip(pairs, found, adjusted, strict=True)
        ]

    def confusions(self, answers: Mapping[str, Answers]) -> list[Confusion]:
        """The pairs of labels that are confused most over all methods; by each, the mean over its runs."""
        counts = {name: count_confused(given.runs, self.truth) for name, given in answers.items()}
        total = sum(counts.values(), Counter[tuple[str, str]]())
        worst = sorted(total, key=lambda pair: (-total[pair], pair))[:CONFUSED]
        return [
            Confusion(
                truth=self.name[truth],
                named=self.name.get(named, named),
                counts={name: counts[name][truth, named] / len(given.runs) for name, given in answers.items()},
            )
            for truth, named in worst
        ]
