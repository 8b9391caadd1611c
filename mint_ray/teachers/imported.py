"""A teacher from the user's own module: found by its path, and held to what a teacher must do."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from mint_ray import storage
from mint_ray.config.loader import UserError
from mint_ray.images import Frame, Seen
from mint_ray.records import Label, Record, TeacherScores
from mint_ray.teachers import FitReport, Teacher
from mint_ray.teachers.config import Imported

METHODS = ("inputs", "fit", "save", "load", "score")
VIEWER_METHODS = ("frame", "score_seen")
MODULE = "module"


def build_imported(config: Imported) -> ImportedTeacher:
    """The user's teacher; a `Viewer` if the class is one."""
    views = all(callable(getattr(_find(config.path), name, None)) for name in VIEWER_METHODS)
    return ImportedViewer(config) if views else ImportedTeacher(config)


class ImportedTeacher:
    """Hands every call on to an instance of the user's class, whose code thereby runs in this process."""

    def __init__(self, config: Imported) -> None:
        """Raises UserError when module, class or one of the methods is missing, or the options do not fit."""
        self.config = config
        found = _find(config.path)
        missing = [name for name in METHODS if not callable(getattr(found, name, None))]
        if missing:
            raise UserError(f"path: {config.path}: no method {missing[0]!r}; a teacher has {', '.join(METHODS)}")
        try:
            inspect.signature(found).bind(**config.options)
        except TypeError as error:
            raise UserError(f"options: {config.path}: {error}") from error
        self.teacher: Teacher = found(**config.options)

    def inputs(self) -> dict[str, str]:
        """What the user's teacher names, and the sha256 of its module's file; what that imports is not looked at."""
        inputs = {MODULE: _sha256(self.config.path), **self.teacher.inputs()}
        for name, identity in inputs.items():
            if not isinstance(identity, str) or not identity:
                raise UserError(f"{self.config.path}: inputs: {name}: expected text, got {identity!r}")
        return inputs

    def fit(self, labels: Sequence[Label], records: Sequence[Record]) -> FitReport:
        report = self.teacher.fit(labels, records)
        if not isinstance(report, FitReport):
            raise UserError(f"{self.config.path}: fit: expected a FitReport, got {type(report).__name__}")
        return report

    def save(self, folder: Path) -> None:
        self.teacher.save(folder)

    def load(self, folder: Path) -> None:
        self.teacher.load(folder)

    def score(self, records: Sequence[Record]) -> list[TeacherScores]:
        """The user's rankings. Raises UserError naming the first record whose ranking is none."""
        return self._checked(records, list(self.teacher.score(records)))

    def _checked(self, records: Sequence[Record], scored: list[TeacherScores]) -> list[TeacherScores]:
        if len(scored) != len(records):
            raise UserError(f"{self.config.path}: score: {len(records)} records went in, {len(scored)} came out")
        for record, row in zip(records, scored, strict=True):
            complaint = _complaint(record, row)
            if complaint:
                raise UserError(f"{self.config.path}: score: record {record.record_id!r}: {complaint}")
        return scored


class ImportedViewer(ImportedTeacher):
    """One whose class has the methods of `mint_ray.teachers.Viewer` as well."""

    teacher: Any

    def frame(self) -> Frame | None:
        frame = self.teacher.frame()
        if frame is not None and not isinstance(frame, Frame):
            raise UserError(f"{self.config.path}: frame: expected a Frame or None, got {type(frame).__name__}")
        return frame

    def score_seen(self, records: Sequence[Record], images: Seen) -> list[TeacherScores]:
        """As `score`, of images that are decoded already."""
        return self._checked(records, list(self.teacher.score_seen(records, images)))


def _find(path: str) -> Any:
    module_name, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(f"path: {path}: no module {error.name!r}, installed or on PYTHONPATH") from error
        raise UserError(f"path: {path}: needs {error.name!r}, which is not installed") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise UserError(f"path: {path}: {module_name} has no {name!r}")
        found = getattr(found, part)
    return found


def _sha256(path: str) -> str:
    module = importlib.import_module(path.partition(":")[0])
    if module.__file__ is None:
        raise UserError(f"path: {path}: its module is not a file, so it has no identity")
    return storage.sha256(module.__file__)


def _complaint(record: Record, row: Any) -> str | None:
    """What keeps `row` from being a ranking of `record`, or None."""
    if not isinstance(row, TeacherScores):
        return f"expected TeacherScores, got {type(row).__name__}"
    if (row.record_id, row.split) != (record.record_id, record.split):
        return f"got the scores of {row.record_id!r} in {row.split}"
    if row.status == "failed":
        return None if row.reason and not row.labels and not row.scores else "failed, so a reason and no labels"
    if not row.labels or len(row.labels) != len(row.scores) or len(set(row.labels)) != len(row.labels):
        return f"expected distinct labels with a score each, got {len(row.labels)} labels and {len(row.scores)} scores"
    if not all(before >= after for before, after in pairwise([*row.scores, float("-inf")])):
        return "expected scores that descend"
    return None
