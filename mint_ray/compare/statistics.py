"""Statistics of a comparison: estimates of each method, paired tests between methods, confusions of labels."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mint_ray.config.comparison import ComparisonConfig
from mint_ray.metrics import (
    Estimate,
    Resampling,
    adjust_holm,
    compare_pair,
    count_top_1_confusions,
    find_subgroups,
    measure_as_paper,
    measure_runs,
)
from mint_ray.records import Label, Method, Prediction, Record
from mint_ray.reports.comparison import Confusion, PairedTest, row_key

MAX_CONFUSIONS = 10
"""Number of confused pairs of labels that the report lists."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodRuns:
    """Predictions of one row of the comparison: a method of the comparison, or the teacher or base student."""

    name: str | None
    """Name of the method in the comparison; None for the teacher and the base student that all methods share."""
    method: Method
    """Model that answered, and how it answered."""
    runs: list[list[Prediction]]
    """Predictions of each run, one run per seed."""

    @property
    def key(self) -> str:
        """Unique key of the row."""
        return row_key(self.name, self.method)


class Statistics:
    """Statistics of methods on the test records of a comparison."""

    def __init__(self, config: ComparisonConfig, labels: Sequence[Label], records: Sequence[Record]) -> None:
        test_records = [record for record in records if record.split == "test"]
        self.sampler, settings = config.pair.sampler, config.evaluate
        self.resampling = Resampling(resamples=settings.resamples, confidence=settings.confidence, seed=settings.seed)
        self.name = {label.label_id: label.name for label in labels}
        self.truth = {record.record_id: record.label_id or "" for record in test_records}
        self.group = {record.record_id: record.group_id for record in test_records}
        trained = Counter(record.label_id or "" for record in records if record.split == "train")
        self.subgroups = find_subgroups(test_records, {label.label_id: trained[label.label_id] for label in labels})

    def estimate(self, runs: Sequence[Sequence[Prediction]], rankings: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """Return `estimates`, `subgroups`, `paper` and `unparsed` of one row.

        Args:
            runs: Predictions of each run.
            rankings: Record to the teacher's label ids, best first.
        """
        paper = [
            measure_as_paper(
                predictions,
                truth=self.truth,
                teacher=rankings,
                name=self.name,
                top=self.sampler.top,
                bottom=self.sampler.num_rejected,
            )
            for predictions in runs
        ]

        def measure(truth: Mapping[str, str]) -> dict[str, Estimate]:
            return measure_runs(
                runs,
                truth=truth,
                teacher=rankings,
                group=self.group,
                top=self.sampler.top,
                bottom=self.sampler.num_rejected,
                resampling=self.resampling,
            )

        return {
            "estimates": measure(self.truth),
            "subgroups": {
                subgroup: measure({key: self.truth[key] for key in sorted(members)})["top_1_accuracy"]
                for subgroup, members in self.subgroups.items()
            },
            "paper": {
                metric: statistics.fmean(values[metric] for values in paper)
                for metric in (paper[0] if all(paper) else {})
            },
            "unparsed": dict(Counter(row.reason for predictions in runs for row in predictions if row.reason)),
        }

    def compare(self, rows: Sequence[MethodRuns], metric: str, reference: str | None) -> list[PairedTest]:
        """Return paired tests of all rows with the same way of answering, with Holm's correction.

        Args:
            rows: Rows of students.
            metric: Metric that is tested.
            reference: Name of the method that is tested against every other row; None tests every pair of rows.
        """
        pairs = [
            (first, second)
            for index, first in enumerate(rows)
            for second in (rows[:index] if reference is None else rows)
            if first is not second
            and first.method.mode == second.method.mode
            and (reference is None or first.name == reference)
        ]
        differences = [
            compare_pair(
                first.runs,
                second.runs,
                metric=metric,
                top=self.sampler.top,
                truth=self.truth,
                group=self.group,
                resampling=self.resampling,
            )
            for first, second in pairs
        ]
        adjusted = adjust_holm([difference.p for difference in differences])
        return [
            PairedTest(first=first.key, second=second.key, difference=difference, adjusted_p=p)
            for (first, second), difference, p in zip(pairs, differences, adjusted, strict=True)
        ]

    def confusions(self, rows: Sequence[MethodRuns]) -> list[Confusion]:
        """Return the pairs of labels that are confused most over all rows; counts are means over the runs of a row."""
        counts = {row.key: count_top_1_confusions(row.runs, self.truth) for row in rows}
        total = sum(counts.values(), Counter[tuple[str, str]]())
        most = sorted(total, key=lambda pair: (-total[pair], pair))[:MAX_CONFUSIONS]
        return [
            Confusion(
                truth=self.name[truth],
                predicted=self.name.get(predicted, predicted),
                counts={row.key: counts[row.key][truth, predicted] / len(row.runs) for row in rows},
            )
            for truth, predicted in most
        ]
