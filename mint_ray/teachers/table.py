"""A teacher whose scores were computed elsewhere and are read from a file."""

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
from mint_ray.config.loader import UserError, one_line
from mint_ray.records import Label, Record, TeacherScores
from mint_ray.teachers import FitReport
from mint_ray.teachers.config import Table
from mint_ray.teachers.rankings import failed_ranking, rank_labels

COLUMNS = ("record_id", "label_id", "score")


class TableTeacher:
    """Teacher that returns the scores in the file.

    A record fails with `no_scores`, or with `scores_incomplete` if it has no score for some label.
    """

    def __init__(self, config: Table) -> None:
        self.config = config
        self.labels: list[str] = []
        self.scores: dict[str, dict[str, float]] = {}

    def fit(self, labels: Sequence[Label], records: Sequence[Record]) -> FitReport:
        """Read the file. Raises UserError naming file, row, column and value of the first invalid row."""
        self.labels = [label.label_id for label in labels]
        known_labels, known_records = set(self.labels), {record.record_id for record in records}
        unused = 0
        for number, row in enumerate(_read_table(self.config.uri).to_pylist(), start=1):
            where = f"{self.config.uri} row {number}"
            if row["label_id"] not in known_labels:
                raise UserError(
                    f"{where}: label_id: {row['label_id']!r} is not one of the task's {len(known_labels)} labels"
                )
            if not isinstance(row["score"], int | float) or not math.isfinite(row["score"]):
                raise UserError(f"{where}: score: expected a finite number, got {row['score']!r}")
            if row["record_id"] not in known_records:
                unused += 1
                continue
            scores = self.scores.setdefault(row["record_id"], {})
            if row["label_id"] in scores:
                raise UserError(f"{where}: label_id: duplicate {row['label_id']!r} for record {row['record_id']!r}")
            scores[row["label_id"]] = float(row["score"])
        return FitReport(counts={"records_with_scores": len(self.scores)}, dropped={"score_of_unknown_record": unused})

    def save(self, folder: Path) -> None:
        """Write the scores of the task's records to `scores.json`."""
        (folder / "scores.json").write_text(json.dumps({"labels": self.labels, "scores": self.scores}))

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        data = json.loads((folder / "scores.json").read_text())
        self.labels, self.scores = data["labels"], data["scores"]

    def score(self, records: Sequence[Record]) -> list[TeacherScores]:
        """Return one ranking per record, in order."""
        return [self._score(record) for record in records]

    def _score(self, record: Record) -> TeacherScores:
        scores = self.scores.get(record.record_id, {})
        if len(scores) < len(self.labels):
            return failed_ranking(record, self.config.kind, "scores_incomplete" if scores else "no_scores")
        return rank_labels(record, self.config.kind, self.labels, [scores[label] for label in self.labels])


def _read_table(uri: str) -> pa.Table:
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
            raise UserError(f"{uri}: cannot be read: {one_line(error)}") from error
    missing = [column for column in COLUMNS if column not in table.column_names]
    if missing:
        raise UserError(f"{uri}: no column {missing[0]!r}; found {', '.join(table.column_names)}")
    table = table.select(list(COLUMNS))
    return table.cast(pa.schema([("record_id", pa.string()), ("label_id", pa.string()), table.schema.field("score")]))
