"""What is asked: labels and synonyms, the prompt, how an answer is written and read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mint_ray.records import Label, Message, Record
from mint_ray.tasks.config import AnyTask


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

    def note(self, record: Record) -> str:
        """What the student may know of the record."""

    def prompt(self, record: Record) -> list[Message]:
        """The conversation up to the student's answer; its last message holds the note word for word."""

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
    from mint_ray.tasks.rare_disease import RareDiseaseTask

    return RareDiseaseTask(config, labels, length)


def make_labels(names: Mapping[str, Sequence[str]], config: AnyTask) -> list[Label]:
    """Labels in the order of `names` (the first name of each is the preferred one), with all synonyms that tell
    one label from the others. Raises UserError for a synonym file that cannot be read or two labels of one name."""
    from mint_ray.tasks import names as naming

    return naming.make_labels(names, config)
