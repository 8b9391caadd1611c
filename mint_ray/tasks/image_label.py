"""Tasks that ask what an image shows, out of a few candidate labels."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Sequence
from functools import lru_cache

from mint_ray.config.loader import UserError
from mint_ray.records import Label, Message, Record
from mint_ray.tasks import Answer
from mint_ray.tasks.config import ImageLabel, TissueType
from mint_ray.tasks.numbered_lists import (
    describe_random_lists,
    fold_accents,
    index_names,
    parse_list,
    write_list,
    write_request,
)


class ImageLabelTask:
    """A question about the image and the visible coded fields, with the candidates in the prompt."""

    modalities: tuple[str, ...] = ("image", "text", "fields")

    def __init__(self, config: ImageLabel | TissueType, labels: Sequence[Label], length: int) -> None:
        if length < 1:
            raise ValueError(f"length must be positive, got {length}")
        self.config = config
        self.labels: tuple[Label, ...] = tuple(labels)
        self.length = length
        self.show_image = config.show_image
        self._by_id = {label.label_id: label for label in labels}
        self._by_name = index_names(labels, normalize)

    def note(self, record: Record) -> str:
        """Return the visible coded fields; "" if the record has none."""
        visible = [(name, record.fields[name]) for name in self.config.visible_fields if record.fields.get(name)]
        return "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in visible)

    def prompt(self, record: Record) -> list[Message]:
        """Return the system prompt and a user message: note, question, candidates, answer format."""
        what = "Name the most likely one" if self.length == 1 else f"List the {self.length} most likely ones"
        candidates = ", ".join(f"'{label.name}'" for label in self.labels)
        parts = [
            self.note(record),
            f"{self.config.question}\nCandidates: {candidates}.",
            write_request(what, self.config.header, self.length),
        ]
        return [
            Message(role="system", content=self.config.system),
            Message(role="user", content="\n\n".join(part for part in parts if part)),
        ]

    def answer(self, label_ids: Sequence[str]) -> str:
        """Return the answer that lists these labels in order. Raises KeyError for an id that is no label."""
        return write_list(self.config.header, [self._by_id[label_id].name for label_id in label_ids])

    def parse(self, text: str) -> Answer:
        """Parse a generated answer; never raises."""
        return parse_list(text, self.config.header, self.length, self._match)

    def find_label_leak(self, record: Record) -> str | None:
        """Return the name of the record's own label in its visible fields; None if there is none.

        A coded field may be the diagnosis under another name; the record's text is not part of the note.
        """
        if record.label_id not in self._by_id:
            return None
        label, note = self._by_id[record.label_id], f" {normalize(self.note(record))} "
        # a label id that is a number may occur by chance, as an age
        names = [label.name, *label.synonyms, *([] if label.label_id.isdigit() else [label.label_id])]
        return next((name for name in names if f" {normalize(name)} " in note), None)

    def ablate(self, record: Record, modality: str) -> Record:
        """Return the record without its image, its text, or its coded fields and findings (`fields`).

        Raises ValueError for another modality.
        """
        match modality:
            case "image":
                return dataclasses.replace(record, image_uri=None)
            case "text":
                return dataclasses.replace(record, text=None)
            case "fields":
                return dataclasses.replace(record, fields={}, phenotypes=[])
        raise ValueError(f"expected one of {', '.join(self.modalities)}, got {modality!r}")

    def caveats(self) -> list[str]:
        """Return what the student is given, how labels are matched, and the accuracy of random lists."""
        given = ["the image"] if self.show_image else []
        if self.config.visible_fields:
            given.append(f"the coded fields {', '.join(self.config.visible_fields)}")
        return [
            f"The student is given {' and '.join(given)}, and no other part of a record.",
            f"The prompt lists all {len(self.labels)} candidates.",
            "Records whose visible coded fields name their own label are dropped. A name is correct only if it is the "
            "name of the label or one of its synonyms.",
            describe_random_lists(self.length, len(self.labels)),
        ]

    def _match(self, name: str) -> str:
        return self._by_name.get(normalize(name), "")


def name_labels(found: Collection[str], config: ImageLabel | TissueType) -> list[Label]:
    """Return the labels of `mint_ray.tasks.make_labels`; `found` are the label ids of the records."""
    known = {named.label_id for named in config.names}
    if unnamed := sorted(set(found) - known):
        raise UserError(
            f"task.names: no name for the label {unnamed[0]!r} of the records; name it, or select labels with "
            "task.labels.ids"
        )
    labels = [
        Label(label_id=named.label_id, name=named.name, synonyms=list(named.synonyms))
        for named in config.names
        if named.label_id in found
    ]
    index_names(labels, normalize)  # raises for two labels of one name before any work
    return labels


@lru_cache(maxsize=10_000)
def normalize(name: str) -> str:
    """Return the name without differences of case, accents, punctuation and spaces, and with `&` as `and`.

    `Head & Neck` becomes `head and neck`.
    """
    return " ".join(re.findall(r"[^\W_]+", fold_accents(name).replace("&", " and ")))
