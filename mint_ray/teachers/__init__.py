"""Teachers: models that score every candidate label of a record.

Importing this loads no torch, transformers or scikit-learn; `build_teacher` loads what the kind of teacher needs.

Tested by tests/teachers/test_conformance.py and tests/teachers/test_inputs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, assert_never, runtime_checkable

from mint_ray.records import Label, Record, TeacherScores
from mint_ray.teachers.config import AnyTeacher, Clip, Ensemble, Fusion, Generative, Imported, Ontology, Table
from mint_ray.teachers.inputs import teacher_inputs

if TYPE_CHECKING:
    from mint_ray.images import Frame, Images

__all__ = [
    "Checkpointer",
    "FitReport",
    "ImageTeacher",
    "ImportableTeacher",
    "Teacher",
    "TrainableTeacher",
    "build_teacher",
    "teacher_inputs",
]


@dataclass(frozen=True)
class FitReport:
    """Summary of fitting a teacher."""

    counts: dict[str, int] = field(default_factory=dict)
    """Number of records, labels and the like that the teacher was fitted on."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Number of records or rows that were left out, by reason."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the teacher on the validation split, if it was evaluated."""


class Teacher(Protocol):
    """A model that ranks all labels of the task for each record. Call `fit` or `load` before `score`.

    It pickles with what it has learned, since workers receive it that way.
    """

    def fit(self, labels: Sequence[Label], records: Sequence[Record]) -> FitReport:
        """Learn from the records of the training split.

        Records of the validation split may choose hyperparameters, weights and a temperature. Of the test split only
        what must be excluded, such as its publications, may be used.
        """

    def save(self, folder: Path) -> None:
        """Write what was learned to an existing, empty folder."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""

    def score(self, records: Sequence[Record]) -> list[TeacherScores]:
        """Return one ranking per record, in order. The ranking of a record does not depend on the rest of the batch."""


@runtime_checkable
class ImageTeacher(Protocol):
    """A teacher that can score images decoded by other workers, in addition to the methods of `Teacher`."""

    def frame(self) -> Frame | None:
        """Return the form of its images, known before `fit` and `load`; None if its settings exclude images."""

    def score_images(self, records: Sequence[Record], images: Images) -> list[TeacherScores]:
        """Return the same rankings as `score`, from decoded images; an ImageError fails its record with its reason."""


class ImportableTeacher(Teacher, Protocol):
    """A teacher written by a user and loaded by `kind: import`."""

    def inputs(self) -> dict[str, str]:
        """Return an identity (a version, a sha256) of everything it reads in addition to records and its own module.

        A changed identity fits the teacher again. Raises UserError if something is missing.
        """


class Checkpointer(Protocol):
    """Storage for the state of a training run that can be interrupted, and for its progress."""

    def resume_from(self) -> Path | None:
        """Return the folder of the last checkpoint; None to start from the beginning."""

    def report_progress(self, done: int, total: int) -> None:
        """Report the number of this process's records read ahead of the first epoch. Every process calls it."""

    def save_checkpoint(self, save: Callable[[Path], None], epoch: int, num_epochs: int, message: str) -> None:
        """Save a checkpoint after an epoch: rank 0 calls `save` with a folder. Every process calls this."""


@runtime_checkable
class TrainableTeacher(Protocol):
    """A teacher trained by gradient descent, in one process or in several joined by torch.distributed."""

    def train(self, labels: Sequence[Label], records: Sequence[Record], checkpointer: Checkpointer) -> FitReport:
        """Learn as `fit` does, with checkpoints. Every process gets all records and ends with the same weights."""


def build_teacher(config: AnyTeacher) -> Teacher:
    """Return the teacher that `config` describes, not fitted. Loads no weights.

    Raises:
        UserError: The module, class or options of an `import` teacher are wrong.
    """
    teacher: Teacher
    match config:
        case Table():
            from mint_ray.teachers.table import TableTeacher

            teacher = TableTeacher(config)
        case Ontology():
            from mint_ray.teachers.ontology import OntologyTeacher

            teacher = OntologyTeacher(config)
        case Generative():
            from mint_ray.teachers.generative import build_generative

            teacher = build_generative(config)
        case Clip():
            from mint_ray.teachers.clip import ClipTeacher

            teacher = ClipTeacher(config)
        case Fusion():
            from mint_ray.teachers.fusion import build_fusion

            teacher = build_fusion(config)
        case Imported():
            from mint_ray.teachers.imported import build_imported

            teacher = build_imported(config)
        case Ensemble():
            from mint_ray.teachers.ensemble import EnsembleTeacher

            teacher = EnsembleTeacher(config)
        case _:
            assert_never(config)
    return teacher
