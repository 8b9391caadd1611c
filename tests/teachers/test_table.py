"""Scores are read from a file, and invalid rows are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from mint_ray.config.loader import UserError
from mint_ray.teachers import teacher_inputs
from mint_ray.teachers.config import Table
from mint_ray.teachers.table import TableTeacher
from tests.teachers.conformance import LABELS, RECORDS


def write(tmp_path: Path, *rows: str) -> TableTeacher:
    path = tmp_path / "scores.csv"
    path.write_text("\n".join(["record_id,label_id,score", *rows]) + "\n")
    return TableTeacher(Table(uri=str(path)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("r1,OMIM:1,0.5", "row 2: label_id: 'OMIM:1' is not one of the task's 3 labels"),
        ("r1,OMIM:142900,nan", "row 2: score: expected a finite number, got nan"),
        ("r1,OMIM:142900,", "row 2: score: expected a finite number, got None"),
        ("r1,OMIM:154700,0.5", "row 2: label_id: duplicate 'OMIM:154700' for record 'r1'"),
    ],
)
def test_an_invalid_row_is_named(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(UserError, match=r"scores\.csv") as caught:
        write(tmp_path, "r1,OMIM:154700,1.0", row).fit(LABELS, RECORDS)
    assert message in str(caught.value)


def test_a_record_with_missing_scores_fails_with_a_reason(tmp_path: Path) -> None:
    teacher = write(tmp_path, "r1,OMIM:154700,1.0")
    teacher.fit(LABELS, RECORDS)
    assert [row.reason for row in teacher.score(RECORDS)] == ["scores_incomplete", "no_scores", "no_scores"]


def test_scores_of_unknown_records_are_counted(tmp_path: Path) -> None:
    report = write(tmp_path, "unknown,OMIM:154700,1.0").fit(LABELS, RECORDS)
    assert report.dropped == {"score_of_unknown_record": 1}


def test_a_missing_file_or_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.csv: no such file"):
        teacher_inputs(Table(uri=str(tmp_path / "none.csv")))
    path = tmp_path / "s.csv"
    path.write_text("record_id,label\nr1,x\n")
    with pytest.raises(UserError, match="no column 'label_id'; found record_id, label"):
        TableTeacher(Table(uri=str(path))).fit(LABELS, RECORDS)
