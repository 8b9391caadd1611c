"""A teacher as a user might write one: the longer a label's name, the better."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mint_ray.records import Label, Record, TeacherScores
from mint_ray.teachers import FitReport


class LongestName:
    """`faults` are record ids whose rankings are spoilt in the way that `fault` names."""

    def __init__(self, step: float = 1.0, fault: str = "", silent: Sequence[str] = ()) -> None:
        self.step, self.fault, self.silent = step, fault, set(silent)

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
        if record.record_id in self.silent:
            return TeacherScores(
                record_id=record.record_id, split=record.split, teacher="longest",
                labels=[], scores=[], status="failed", reason="told_so",
            )  # fmt: skip
        labels = sorted(self.names, key=lambda label: -len(self.names[label]))
        scores = [self.step * len(self.names[label]) for label in labels]
        return TeacherScores(
            record_id="someone" if self.fault == "record" else record.record_id, split=record.split, teacher="longest",
            labels=[*labels[:-1], labels[0]] if self.fault == "twice" else labels,
            scores=scores[::-1] if self.fault == "ascending" else [*scores[:-1], float("nan")] if self.fault == "nan" else scores,
        )  # fmt: skip


class NoScore:
    """Lacks what a teacher is for."""

    inputs = fit = save = load = lambda self: None
