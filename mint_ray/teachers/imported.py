"""A teacher from the user's own module, whose results are checked."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from mint_ray import storage
from mint_ray.config.loader import UserError
from mint_ray.images import Frame, Images
from mint_ray.records import Label, Record, TeacherScores
from mint_ray.teachers import FitReport, ImportableTeacher
from mint_ray.teachers.config import Imported

METHODS = ("inputs", "fit", "save", "load", "score")
IMAGE_METHODS = ("frame", "score_images")


def build_imported(config: Imported) -> ImportedTeacher:
    """Return the user's teacher; an `ImageTeacher` if its class has the methods of one."""
    cls = _import_class(config.path)
    takes_images = all(callable(getattr(cls, name, None)) for name in IMAGE_METHODS)
    return ImportedImageTeacher(config) if takes_images else ImportedTeacher(config)


class ImportedTeacher:
    """Wrapper that calls an instance of the user's class in this process, and checks what it returns."""

    def __init__(self, config: Imported) -> None:
        """Create the user's object.

        Raises:
            UserError: Module, class or a method is missing, or the options do not fit the class.
        """
        self.config = config
        cls = _import_class(config.path)
        missing = [name for name in METHODS if not callable(getattr(cls, name, None))]
        if missing:
            raise UserError(f"path: {config.path}: no method {missing[0]!r}; a teacher has {', '.join(METHODS)}")
        try:
            inspect.signature(cls).bind(**config.options)
        except TypeError as error:
            raise UserError(f"options: {config.path}: {error}") from error
        self.teacher: ImportableTeacher = cls(**config.options)

    def inputs(self) -> dict[str, str]:
        """Return the identities that the user's teacher gives, and the sha256 of its module's file.

        Modules that it imports are not part of the identity.
        """
        inputs = {"module": _module_sha256(self.config.path), **self.teacher.inputs()}
        for name, identity in inputs.items():
            if not isinstance(identity, str) or not identity:
                raise UserError(f"{self.config.path}: inputs: {name}: expected a non-empty string, got {identity!r}")
        return inputs

    def fit(self, labels: Sequence[Label], records: Sequence[Record]) -> FitReport:
        """Fit the user's teacher. Raises UserError if it does not return a FitReport."""
        report = self.teacher.fit(labels, records)
        if not isinstance(report, FitReport):
            raise UserError(f"{self.config.path}: fit: expected a FitReport, got {type(report).__name__}")
        return report

    def save(self, folder: Path) -> None:
        """Call `save` of the user's teacher."""
        self.teacher.save(folder)

    def load(self, folder: Path) -> None:
        """Call `load` of the user's teacher."""
        self.teacher.load(folder)

    def score(self, records: Sequence[Record]) -> list[TeacherScores]:
        """Return the user's rankings. Raises UserError naming the first record with an invalid one."""
        return self._check(records, list(self.teacher.score(records)))

    def _check(self, records: Sequence[Record], rows: list[TeacherScores]) -> list[TeacherScores]:
        if len(rows) != len(records):
            raise UserError(f"{self.config.path}: score: expected {len(records)} rankings, got {len(rows)}")
        for record, row in zip(records, rows, strict=True):
            problem = _find_problem(record, row)
            if problem:
                raise UserError(f"{self.config.path}: score: record {record.record_id!r}: {problem}")
        return rows


class ImportedImageTeacher(ImportedTeacher):
    """Wrapper of a user's class that has the methods of `mint_ray.teachers.ImageTeacher` as well."""

    teacher: Any

    def frame(self) -> Frame | None:
        """Return the form of the user's images. Raises UserError if it is no Frame."""
        frame = self.teacher.frame()
        if frame is not None and not isinstance(frame, Frame):
            raise UserError(f"{self.config.path}: frame: expected a Frame or None, got {type(frame).__name__}")
        return frame

    def score_images(self, records: Sequence[Record], images: Images) -> list[TeacherScores]:
        """Return the user's rankings from decoded images, checked as in `score`."""
        return self._check(records, list(self.teacher.score_images(records, images)))


def _import_class(path: str) -> Any:
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


def _module_sha256(path: str) -> str:
    module = importlib.import_module(path.partition(":")[0])
    if module.__file__ is None:
        raise UserError(f"path: {path}: its module is not a file, so it has no identity")
    return storage.sha256(module.__file__)


def _find_problem(record: Record, row: Any) -> str | None:
    """Return the reason why `row` is not a ranking of `record`, or None."""
    problem = None
    if not isinstance(row, TeacherScores):
        problem = f"expected TeacherScores, got {type(row).__name__}"
    elif (row.record_id, row.split) != (record.record_id, record.split):
        problem = f"got the scores of {row.record_id!r} in {row.split}"
    elif row.status == "failed":
        if not row.reason or row.labels or row.scores:
            problem = "expected a reason and no labels for a failed record"
    elif not row.labels or len(row.labels) != len(row.scores) or len(set(row.labels)) != len(row.labels):
        problem = (
            f"expected distinct labels with a score each, got {len(row.labels)} labels and {len(row.scores)} scores"
        )
    elif not all(before >= after for before, after in pairwise([*row.scores, float("-inf")])):
        problem = "expected descending scores"
    return problem
