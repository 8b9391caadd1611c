"""Ask for the rare diseases behind a clinical note, and read the list of names that comes back."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from mint_ray.ontology import FACE, load_ontology
from mint_ray.records import Label, Message, Phenotype, Record
from mint_ray.tasks import Answer
from mint_ray.tasks.config import RareDisease
from mint_ray.tasks.lists import index_names, read_list, write_list, write_request
from mint_ray.tasks.names import GENERIC, head, is_abbreviation, lowered, normalise

SYSTEM = "You are a genetic counsellor. Keep to the answer format."
HEADER = "POTENTIAL_DISEASES:"

ADULT_YEARS = 18
OWN_ID = re.compile(r"\s*[(\[]\s*((?:OMIM|MIM|ORPHA|MONDO)\W*\d+)\s*[)\]]\s*$", re.IGNORECASE)


class RareDiseaseTask:
    """The student reads sex, age and findings outside the face; facial findings stand in for a photograph."""

    modalities: tuple[str, ...] = ("face", "body")
    shows_image = False

    def __init__(self, config: RareDisease, labels: Sequence[Label], length: int) -> None:
        if length < 1:
            raise ValueError(f"length must be positive, got {length}")
        self.config = config
        self.labels: tuple[Label, ...] = tuple(labels)
        self.length = length
        self._by_id = {label.label_id: label for label in labels}
        self._by_name = index_names(labels, normalise)
        self._ontology = load_ontology()

    def note(self, record: Record) -> str:
        if record.text is not None:
            return self._without_gene(record.text, record)
        told = [item for item in record.phenotypes if not (self.config.hide_face and self._is_facial(item))]
        present = self._most_specific([item for item in told if not item.excluded], self.config.max_findings)
        absent = self._most_specific([item for item in told if item.excluded], self.config.max_absent)
        gene = None if self.config.hide_gene else record.fields.get("gene")
        sentences = [
            f"{_patient(record)} has {_join(present, 'and')}." if present else f"{_patient(record)} was seen.",
            f"Looked for and absent: {_join(absent, 'and')}." if absent else "",
            f"Gene: {gene}." if gene else "",
        ]
        return " ".join(sentence for sentence in sentences if sentence)

    def prompt(self, record: Record) -> list[Message]:
        what = "Name the most likely disease" if self.length == 1 else f"List the {self.length} most likely diseases"
        return [
            Message(role="system", content=SYSTEM),
            Message(role="user", content=f"{self.note(record)}\n\n{write_request(what, HEADER, self.length)}"),
        ]

    def answer(self, label_ids: Sequence[str]) -> str:
        return write_list(HEADER, [self._by_id[label_id].name for label_id in label_ids])

    def parse(self, text: str) -> Answer:
        return read_list(text, HEADER, self.length, self._match)

    def leak(self, record: Record) -> str | None:
        if record.label_id not in self._by_id:
            return None
        label, note = self._by_id[record.label_id], self.note(record)
        folded = f" {normalise(note)} "
        for name in [label.name, *label.synonyms]:
            if is_abbreviation(name):
                if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", note):
                    return name
                continue
            for words in (name, head(name)):
                key = normalise(words)
                if key and not GENERIC.issuperset(key.split()) and f" {key} " in folded:
                    return words
        return None

    def without(self, record: Record, modality: str) -> Record:
        """`face` takes the photograph and facial findings away, `body` all other findings and the text."""
        if modality not in self.modalities:
            raise ValueError(f"expected one of {', '.join(self.modalities)}, got {modality!r}")
        facial = modality == "face"
        kept = [item for item in record.phenotypes if self._is_facial(item) != facial]
        if facial:
            return dataclasses.replace(record, phenotypes=kept, image_uri=None)
        return dataclasses.replace(record, phenotypes=kept, text=None)

    def notes(self) -> list[str]:
        face = (
            "The student does not read them; findings of eyes, ears and jaw that the ontology files elsewhere, such as "
            "hypertelorism, it does read."
            if self.config.hide_face
            else "Here the student reads them too."
        )
        gene = (
            "The gene is kept out of the note."
            if self.config.hide_gene
            else "The note names the gene, which tells the disease almost one to one."
        )
        return [
            f"Facial findings (HP:0000271 and below) stand in for the photograph; no image was seen by anyone. {face}",
            gene,
            "A record's own text is given as it stands; where there is none, one template writes the note from at most "
            f"{self.config.max_findings} present and {self.config.max_absent} absent coded findings.",
            "A note that names its own diagnosis is left out; a name counts as right only if its numbers agree.",
            f"A list of {self.length} drawn blindly from the {len(self.labels)} labels holds the right one in "
            f"{min(1.0, self.length / max(1, len(self.labels))):.1%} of cases.",
        ]

    def _is_facial(self, item: Phenotype) -> bool:
        return self._ontology.is_a(item.id, FACE)

    def _most_specific(self, items: list[Phenotype], most: int) -> list[str]:
        ordered = sorted(items, key=lambda item: -self._ontology.specificity(item.id))
        return [lowered(item.label) for item in ordered[:most]]

    def _without_gene(self, text: str, record: Record) -> str:
        gene = record.fields.get("gene")
        if not gene or not self.config.hide_gene:
            return text
        return re.sub(rf"(?<!\w)(?:{'|'.join(map(re.escape, gene.split(';')))})(?!\w)", "[gene]", text)

    def _match(self, name: str) -> str:
        exact = self._by_name.get(normalise(name))
        own_id = OWN_ID.search(name)
        if exact is not None or own_id is None:
            return exact or ""
        label_id = self._by_name.get(normalise(name[: own_id.start()]), "")
        # a name with another disease's number after it names neither
        same = re.sub(r"\D", "", own_id[1]) == re.sub(r"\D", "", label_id)
        return label_id if same else ""


def _patient(record: Record) -> str:
    sex = record.fields.get("sex", "")
    age = _age(record.fields.get("age", ""))
    if age is None:
        return {"MALE": "A male patient", "FEMALE": "A female patient"}.get(sex, "A patient")
    number, unit = age
    child = unit != "year" or number < ADULT_YEARS
    nouns = {"MALE": "boy" if child else "man", "FEMALE": "girl" if child else "woman"}
    noun = nouns.get(sex, "child" if child else "adult")
    if number == 0:
        return f"A newborn {noun}"
    # 8, 11, 18 and 80 to 89 are spoken with a vowel ahead
    article = "An" if number in (8, 11, 18) or 80 <= number <= 89 else "A"
    return f"{article} {number}-{unit}-old {noun}"


def _age(duration: str) -> tuple[int, str] | None:
    """The largest whole unit of an ISO 8601 duration; None where there is no such duration."""
    match = re.fullmatch(r"P(?:(\d+)Y)?(?:(\d+)M)?(?:(\d+)W)?(?:(\d+)D)?(?:T.*)?", duration)
    if match is None or duration == "P":
        return None
    for number, unit in zip(match.groups(), ("year", "month", "week", "day"), strict=True):
        if number and int(number):
            return int(number), unit
    return 0, "day"


def _join(items: list[str], conjunction: str) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {conjunction} {items[-1]}"
