"""Who knows: models that score every candidate label of a record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, assert_never, runtime_checkable

from mint_ray.records import Label, Record, TeacherScores
from mint_ray.teachers.config import AnyTeacher, Clip, Ensemble, Fusion, Generative, Imported, Ontology, Table

if TYPE_CHECKING:
    from mint_ray.images import Frame, Seen


@dataclass(frozen=True)
class FitReport:
    """What a teacher was made from, and what was left out, by reason."""

    counts: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    """How good it is on the validation split, where it was judged."""


class Teacher(Protocol):
    """Ranks every label of the task for each record: `fit` or `load` first, then `score`.

    One that looks at images is a `Viewer` too.
    """

    def inputs(self) -> dict[str, str]:
        """Identity of everything it reads beside the records. Raises UserError when something is missing."""

    def fit(self, labels: Sequence[Label], records: Sequence[Record]) -> FitReport:
        """Learn from the records of the training split; held-out ones only say what must not be used.

        An ensemble weighs its members on the validation split, when it is told to learn their weights.
        """

    def save(self, folder: Path) -> None:
        """Write what was learned into an existing folder."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""

    def score(self, records: Sequence[Record]) -> list[TeacherScores]:
        """One ranking per record, in order; the same record gets the same ranking in any batch."""


@runtime_checkable
class Viewer(Protocol):
    """A teacher whose images others may decode ahead of it, on processors that cost less than its own."""

    def frame(self) -> Frame | None:
        """The form in which it wants them, known before `fit` and `load`; None if it was told to look at none."""

    def score_seen(self, records: Sequence[Record], images: Seen) -> list[TeacherScores]:
        """As `score`, which reads the images itself; an image that cannot be read fails its record with that reason."""


class Checkpoints(Protocol):
    """Where training that may be cut off leaves its state, and finds it again."""

    def last(self) -> Path | None:
        """Folder of the state that was left last; None at the start."""

    def tell(self, done: int, whole: int) -> None:
        """Called by every process while it reads records ahead of the first epoch: how many of its own."""

    def keep(self, save: Callable[[Path], None], epoch: int, epochs: int, note: str) -> None:
        """Called by every process after each epoch; `save` writes the state into a folder, of one process."""


@runtime_checkable
class Trainable(Protocol):
    """A teacher that learns by gradient descent, in as many processes as torch.distributed has joined."""

    def train(self, labels: Sequence[Label], records: Sequence[Record], checkpoints: Checkpoints) -> FitReport:
        """As `fit`, which does it in one go; every process gets all records and ends with the same teacher."""


def build_teacher(config: AnyTeacher) -> Teacher:
    """The teacher that `config` describes, not yet fitted."""
    match config:
        case Table():
            from mint_ray.teachers.table import TableTeacher

            return TableTeacher(config)
        case Ontology():
            from mint_ray.teachers.ontology import OntologyTeacher

            return OntologyTeacher(config)
        case Generative():
            from mint_ray.teachers.generative import GenerativeTeacher, GenerativeViewer

            return GenerativeViewer(config) if config.shows_image else GenerativeTeacher(config)
        case Clip():
            from mint_ray.teachers.clip import ClipTeacher

            return ClipTeacher(config)
        case Fusion():
            from mint_ray.teachers.fusion import FusionTeacher, FusionViewer

            return FusionViewer(config) if config.image or config.joint else FusionTeacher(config)
        case Imported():
            from mint_ray.teachers.imported import build_imported

            return build_imported(config)
        case Ensemble():
            from mint_ray.teachers.ensemble import EnsembleTeacher

            return EnsembleTeacher(config)
        case _:
            assert_never(config)
