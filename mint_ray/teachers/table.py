"""A teacher whose scores were made elsewhere and are read from a file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from mint_ray import storage
from mint_ray.config.loader import UserError
from mint_ray.records import Label, Record, TeacherScores
from mint_ray.teachers import FitReport
from mint_ray.teachers.config import Table

COLUMNS = ("record_id", "label_id", "score")


class TableTeacher:
    """Looks up each record's scores; a record without a score for every label fails with a reason."""

    def __init__(self, config: Table) -> None:
        self.config = config
        self.labels: list[str] = []
        self.scores: dict[str, dict[str, float]] = {}

    def inputs(self) -> dict[str, str]:
        return {"scores": storage.sha256(self.config.uri)}

    def fit(self, labels: Sequence[Label], records: Sequence[Record]) -> FitReport:
        """Read the file. Raises UserError naming file, row, field and value of the first bad row."""
        self.labels = [label.label_id for label in labels]
        known, wanted = set(self.labels), {record.record_id for record in records}
        unused = 0
        for number, row in enumerate(_read(self.config.uri).to_pylist(), start=1):
            where = f"{self.config.uri} row {number}"
            if row["label_id"] not in known:
                raise UserError(f"{where}: label_id: {row['label_id']!r} is not one of the task's {len(known)} labels")
            if not isinstance(row["score"], int | float) or not math.isfinite(row["score"]):
                raise UserError(f"{where}: score: expected a finite number, got {row['score']!r}")
            if row["record_id"] not in wanted:
                unused += 1
                continue
            held = self.scores.setdefault(row["record_id"], {})
            if row["label_id"] in held:
                raise UserError(f"{where}: label_id: {row['label_id']!r} again for record {row['record_id']!r}")
            held[row["label_id"]] = float(row["score"])
        return FitReport(counts={"records_with_scores": len(self.scores)}, dropped={"score_of_unknown_record": unused})

    def save(self, folder: Path) -> None:
        (folder / "scores.json").write_text(json.dumps({"labels": self.labels, "scores": self.scores}))

    def load(self, folder: Path) -> None:
        data = json.loads((folder / "scores.json").read_text())
        self.labels, self.scores = data["labels"], data["scores"]

    def score(self, records: Sequence[Record]) -> list[TeacherScores]:
        return [self._score(record) for record in records]

    def _score(self, record: Record) -> TeacherScores:
        held = self.scores.get(record.record_id, {})
        if len(held) < len(self.labels):
            reason = "no_scores" if not held else "scores_incomplete"
            return TeacherScores(
                record_id=record.record_id, split=record.split, teacher=self.config.kind,
                labels=[], scores=[], status="failed", reason=reason,
            )  # fmt: skip
        ranked = sorted(self.labels, key=lambda label: -held[label])
        return TeacherScores(
            record_id=record.record_id, split=record.split, teacher=self.config.kind,
            labels=ranked, scores=[held[label] for label in ranked],
        )  # fmt: skip


def _read(uri: str) -> pa.Table:
    with storage.open_input(uri) as stream:
        try:
            if uri.endswith(".parquet"):
                table = pq.read_table(stream)
            elif uri.endswith(".csv"):
                options = pyarrow.csv.ConvertOptions(null_values=[""], strings_can_be_null=True)
                table = pyarrow.csv.read_csv(stream, convert_options=options)
            elif uri.endswith(".jsonl"):
                table = pyarrow.json.read_json(stream)
            else:
                raise UserError(f"{uri}: expected a name ending in .parquet, .csv or .jsonl")
        except pa.ArrowInvalid as error:
            raise UserError(f"{uri}: cannot be read: {' '.join(str(error).split())}") from error
    missing = [column for column in COLUMNS if column not in table.column_names]
    if missing:
        raise UserError(f"{uri}: no column {missing[0]!r}; found {', '.join(table.column_names)}")
    table = table.select(list(COLUMNS))
    return table.cast(pa.schema([("record_id", pa.string()), ("label_id", pa.string()), table.schema.field("score")]))
