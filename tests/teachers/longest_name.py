"""A teacher as a user might write one: the longer a label's name, the higher its score."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mint_ray.records import Label, Record, TeacherScores
from mint_ray.teachers import FitReport


class LongestNameTeacher:
    """Teacher that returns invalid results if `fault` names a kind of them."""

    def __init__(self, step: float = 1.0, fault: str = "") -> None:
        self.step, self.fault = step, fault

    def inputs(self) -> dict[str, str]:
        return {} if self.fault != "inputs" else {"weights": ""}

    def fit(self, labels: Sequence[Label], records: Sequence[Record]) -> FitReport:
        self.names = {label.label_id: label.name for label in labels}
        return FitReport(counts={"labels": len(labels)})

    def save(self, folder: Path) -> None:
        (folder / "names.json").write_text(json.dumps(self.names))

    def load(self, folder: Path) -> None:
        self.names = json.loads((folder / "names.json").read_text())

    def score(self, records: Sequence[Record]) -> list[TeacherScores]:
        return [self._score(record) for record in records][1 if self.fault == "fewer" else 0 :]

    def _score(self, record: Record) -> TeacherScores:
        labels = sorted(self.names, key=lambda label: -len(self.names[label]))
        scores = [self.step * len(self.names[label]) for label in labels]
        if self.fault == "ascending":
            scores.reverse()
        if self.fault == "nan":
            scores[-1] = float("nan")
        return TeacherScores(
            record_id="other" if self.fault == "record" else record.record_id, split=record.split,
            teacher="longest_name", labels=[*labels[:-1], labels[0]] if self.fault == "duplicate" else labels,
            scores=scores,
        )  # fmt: skip


class NoScore:
    """Class without the method `score`."""

    inputs = fit = save = load = lambda self: None
