"""Ask what an image shows, out of a few labels, and read the list of names that comes back."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Sequence
from functools import lru_cache

from mint_ray.config.loader import UserError
from mint_ray.records import Label, Message, Record
from mint_ray.tasks import Answer
from mint_ray.tasks.config import ImageLabel, TissueType
from mint_ray.tasks.lists import index_names, read_list, without_accents, write_list, write_request


class ImageLabelTask:
    """The student sees the image, and reads the candidates and the coded fields that it is told."""

    modalities: tuple[str, ...] = ("image", "text", "fields")

    def __init__(self, config: ImageLabel | TissueType, labels: Sequence[Label], length: int) -> None:
        if length < 1:
            raise ValueError(f"length must be positive, got {length}")
        self.config = config
        self.labels: tuple[Label, ...] = tuple(labels)
        self.length = length
        self.shows_image = config.shows_image
        self._by_id = {label.label_id: label for label in labels}
        self._by_name = index_names(labels, normalise)

    def note(self, record: Record) -> str:
        told = [(name, record.fields[name]) for name in self.config.told if record.fields.get(name)]
        return "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in told)

    def prompt(self, record: Record) -> list[Message]:
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
        return write_list(self.config.header, [self._by_id[label_id].name for label_id in label_ids])

    def parse(self, text: str) -> Answer:
        return read_list(text, self.config.header, self.length, self._match)

    def leak(self, record: Record) -> str | None:
        """The record's text is told to nobody; a coded field may be the diagnosis under another name."""
        if record.label_id not in self._by_id:
            return None
        label, told = self._by_id[record.label_id], f" {normalise(self.note(record))} "
        # a label that is a number says nothing where it stands as an age
        names = [label.name, *label.synonyms, *([] if label.label_id.isdigit() else [label.label_id])]
        return next((name for name in names if f" {normalise(name)} " in told), None)

    def without(self, record: Record, modality: str) -> Record:
        """`image` and `text` take these away, `fields` the coded fields and coded findings."""
        match modality:
            case "image":
                return dataclasses.replace(record, image_uri=None)
            case "text":
                return dataclasses.replace(record, text=None)
            case "fields":
                return dataclasses.replace(record, fields={}, phenotypes=[])
        raise ValueError(f"expected one of {', '.join(self.modalities)}, got {modality!r}")

    def notes(self) -> list[str]:
        fields = f"the coded fields {', '.join(self.config.told)}" if self.config.told else ""
        seen = ["the image"] if self.shows_image else []
        return [
            f"The student is given {' and '.join([*seen, *([fields] if fields else [])])}; it reads nothing else of a "
            "record.",
            f"The prompt lists all {len(self.labels)} candidates.",
            "A record whose coded fields name its own label is left out; a name counts as right only if it is that of "
            "a label or one of its synonyms.",
            f"A list of {self.length} drawn blindly from the {len(self.labels)} labels holds the right one in "
            f"{min(1.0, self.length / max(1, len(self.labels))):.1%} of cases.",
        ]

    def _match(self, name: str) -> str:
        return self._by_name.get(normalise(name), "")


def name_labels(found: Collection[str], config: ImageLabel | TissueType) -> list[Label]:
    """See `mint_ray.tasks.make_labels`."""
    known = {named.label_id for named in config.names}
    if strange := sorted(set(found) - known):
        raise UserError(
            f"task.names: no name for the label {strange[0]!r} of the records; `task.labels.ids` says which to ask for"
        )
    labels = [
        Label(label_id=named.label_id, name=named.name, synonyms=list(named.synonyms))
        for named in config.names
        if named.label_id in found
    ]
    index_names(labels, normalise)  # two labels of one name are an error here, not in training
    return labels


@lru_cache(maxsize=10_000)
def normalise(name: str) -> str:
    """The name with case, accents, punctuation and spaces folded, `&` as `and`: `Head & Neck` is `head and neck`."""
    return " ".join(re.findall(r"[^\W_]+", without_accents(name).replace("&", " and ")))
