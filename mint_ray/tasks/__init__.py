"""Tasks: the question, its labels and synonyms, the prompt, and how an answer is written and parsed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, assert_never

from mint_ray.records import Label, Message, Record
from mint_ray.tasks.config import AnyTask, ImageLabel, RareDisease, TissueType


@dataclass(frozen=True)
class Answer:
    """A parsed answer."""

    labels: list[str] = field(default_factory=list)
    """Label id of each name in the list, in order; an empty string for a name that is no label."""
    names: list[str] = field(default_factory=list)
    """The names as written, without quotes; as many as `labels`."""
    reason: str | None = None
    """Why no list could be parsed: `empty`, `no_list` or `too_many`; None for a list."""


class Task(Protocol):
    """Turns records into prompts, labels into answers, and answers back into labels."""

    labels: tuple[Label, ...]
    modalities: tuple[str, ...]
    """Modalities that `ablate` can remove."""
    show_image: bool
    """True if the prompt has the record's image ahead of the first user message."""

    def note(self, record: Record) -> str:
        """Return the part of the record that the student reads; "" if it reads nothing."""

    def prompt(self, record: Record) -> list[Message]:
        """Return the conversation up to the student's answer; its last message contains the note verbatim, if any."""

    def answer(self, label_ids: Sequence[str]) -> str:
        """Return the answer that lists these labels in order. Raises KeyError for an id that is no label."""

    def parse(self, text: str) -> Answer:
        """Parse a generated answer; never raises."""

    def find_label_leak(self, record: Record) -> str | None:
        """Return the words of the note that name the record's own label; None if there are none."""

    def ablate(self, record: Record, modality: str) -> Record:
        """Return the record without one modality. Raises ValueError for a modality that the task does not have."""

    def caveats(self) -> list[str]:
        """Return sentences that a reader of the report must know."""


def build_task(config: AnyTask, labels: Sequence[Label], length: int) -> Task:
    """Build the task over `labels` that asks for lists of `length`. Raises UserError if two labels share a name."""
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
    """Return the labels of `names` (label_id to names, the preferred one first) with their synonyms.

    A synonym that two labels share is dropped. Image tasks take order, names and synonyms from their settings. Raises
    UserError for a synonym file that cannot be read, a label without a name in the settings, or two labels with the
    same preferred name.
    """
    match config:
        case RareDisease():
            from mint_ray.tasks.disease_names import name_diseases

            return name_diseases(names, config)
        case ImageLabel() | TissueType():
            from mint_ray.tasks.image_label import name_labels

            return name_labels(names, config)
        case _:
            assert_never(config)
