"""What is asked: labels and synonyms, the prompt, how an answer is written and read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, assert_never

from mint_ray.records import Label, Message, Record
from mint_ray.tasks.config import AnyTask, ImageLabel, RareDisease, TissueType


@dataclass(frozen=True)
class Answer:
    """What could be read in a generated answer."""

    labels: list[str] = field(default_factory=list)
    """Label id of each name in the list, in order; an empty string for a name that is no label."""
    names: list[str] = field(default_factory=list)
    """The names as written, quotes stripped; as long as `labels`."""
    reason: str | None = None
    """Why there is no list to read: `empty`, `no_list` or `too_many`."""


class Task(Protocol):
    """Turns records into prompts, labels into answers, and answers back into labels."""

    labels: tuple[Label, ...]
    modalities: tuple[str, ...]
    shows_image: bool
    """Whether the student sees the record's image, ahead of the first user message."""

    def note(self, record: Record) -> str:
        """What the student may read of the record; "" where it reads nothing."""

    def prompt(self, record: Record) -> list[Message]:
        """The conversation up to the student's answer; its last message holds the note word for word, if any."""

    def answer(self, label_ids: Sequence[str]) -> str:
        """The answer that lists these labels in order. Raises KeyError for an id that is no label."""

    def parse(self, text: str) -> Answer:
        """Read a generated answer; never raises."""

    def leak(self, record: Record) -> str | None:
        """The words of the note that name the record's own label, if any."""

    def without(self, record: Record, modality: str) -> Record:
        """The record as if `modality` had not been recorded. Raises ValueError for a modality the task lacks."""

    def notes(self) -> list[str]:
        """Remarks that whoever reads the report has to know."""


def build_task(config: AnyTask, labels: Sequence[Label], length: int) -> Task:
    """The task over `labels`, asking for lists of `length`. Raises UserError if two labels share a name."""
    match config:
        case RareDisease():
            from mint_ray.tasks.rare_disease import RareDiseaseTask

            return RareDiseaseTask(config, labels, length)
        case ImageLabel() | TissueType():
            from mint_ray.tasks.image_label import ImageLabelTask

            return ImageLabelTask(config, labels, length)
        case _:
            assert_never(config)


def make_labels(names: Mapping[str, Sequence[str]], config: AnyTask) -> list[Label]:
    """The labels that `names` has (the first name of each is the preferred one), with all synonyms that tell one label
    from the others; for an image, in the order and by the names of its settings. Raises UserError for a synonym file
    that cannot be read, a label that the settings do not name, or two labels of one name."""
    match config:
        case RareDisease():
            from mint_ray.tasks.names import name_diseases

            return name_diseases(names, config)
        case ImageLabel() | TissueType():
            from mint_ray.tasks.image_label import name_labels

            return name_labels(names, config)
        case _:
            assert_never(config)
