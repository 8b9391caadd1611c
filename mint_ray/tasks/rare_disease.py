"""The task that asks for the rare diseases that a clinical note suggests."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from mint_ray.ontology import FACE, load_ontology
from mint_ray.records import Label, Message, Phenotype, Record, parse_duration
from mint_ray.tasks import Answer
from mint_ray.tasks.config import RareDisease
from mint_ray.tasks.disease_names import GENERIC, base_name, is_abbreviation, lower_first, normalize
from mint_ray.tasks.numbered_lists import describe_random_lists, index_names, parse_list, write_list, write_request

SYSTEM = "You are a genetic counsellor. Keep to the answer format."
HEADER = "POTENTIAL_DISEASES:"

ADULT_YEARS = 18
OWN_ID = re.compile(r"\s*[(\[]\s*((?:OMIM|MIM|ORPHA|MONDO)\W*\d+)\s*[)\]]\s*$", re.IGNORECASE)


class RareDiseaseTask:
    """Diagnosis from a note; facial findings are a proxy for a photograph and are hidden by default."""

    modalities: tuple[str, ...] = ("face", "body")
    show_image = False

    def __init__(self, config: RareDisease, labels: Sequence[Label], length: int) -> None:
        if length < 1:
            raise ValueError(f"length must be positive, got {length}")
        self.config = config
        self.labels: tuple[Label, ...] = tuple(labels)
        self.length = length
        self._by_id = {label.label_id: label for label in labels}
        self._by_name = index_names(labels, normalize)
        self._ontology = load_ontology()

    def note(self, record: Record) -> str:
        """Return the record's text, or a note written from its coded findings; without what the settings hide."""
        if record.text is not None:
            return self._mask_gene(record.text, record)
        visible = [item for item in record.phenotypes if not (self.config.hide_face and self._is_facial(item))]
        present = self._most_specific([item for item in visible if not item.excluded], self.config.max_findings)
        absent = self._most_specific([item for item in visible if item.excluded], self.config.max_absent)
        gene = None if self.config.hide_gene else record.fields.get("gene")
        sentences = [
            f"{_patient(record)} has {_join(present, 'and')}." if present else f"{_patient(record)} was seen.",
            f"Looked for and absent: {_join(absent, 'and')}." if absent else "",
            f"Gene: {gene}." if gene else "",
        ]
        return " ".join(sentence for sentence in sentences if sentence)

    def prompt(self, record: Record) -> list[Message]:
        """Return the system prompt and a user message: the note and the answer format."""
        what = "Name the most likely disease" if self.length == 1 else f"List the {self.length} most likely diseases"
        return [
            Message(role="system", content=SYSTEM),
            Message(role="user", content=f"{self.note(record)}\n\n{write_request(what, HEADER, self.length)}"),
        ]

    def answer(self, label_ids: Sequence[str]) -> str:
        """Return the answer that lists these labels in order. Raises KeyError for an id that is no label."""
        return write_list(HEADER, [self._by_id[label_id].name for label_id in label_ids])

    def parse(self, text: str) -> Answer:
        """Parse a generated answer; never raises."""
        return parse_list(text, HEADER, self.length, self._match)

    def find_label_leak(self, record: Record) -> str | None:
        """Return the words of the note that name the record's own disease, also without its number; None if none do."""
        if record.label_id not in self._by_id:
            return None
        label, note = self._by_id[record.label_id], self.note(record)
        folded = f" {normalize(note)} "
        for name in [label.name, *label.synonyms]:
            if is_abbreviation(name):
                if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", note):
                    return name
                continue
            for words in (name, base_name(name)):
                key = normalize(words)
                if key and not GENERIC.issuperset(key.split()) and f" {key} " in folded:
                    return words
        return None

    def ablate(self, record: Record, modality: str) -> Record:
        """Return the record without its photograph and facial findings (`face`), or its text and others (`body`).

        Raises ValueError for another modality.
        """
        if modality not in self.modalities:
            raise ValueError(f"expected one of {', '.join(self.modalities)}, got {modality!r}")
        facial = modality == "face"
        kept = [item for item in record.phenotypes if self._is_facial(item) != facial]
        if facial:
            return dataclasses.replace(record, phenotypes=kept, image_uri=None)
        return dataclasses.replace(record, phenotypes=kept, text=None)

    def caveats(self) -> list[str]:
        """Return what replaces the photograph, what the note contains, and the accuracy of random lists."""
        face = (
            "The student does not read them. It does read findings of eyes, ears and jaw that the ontology has outside "
            "the face, such as hypertelorism."
            if self.config.hide_face
            else "The student reads them, too."
        )
        gene = (
            "The note does not contain the gene."
            if self.config.hide_gene
            else "The note contains the gene, which almost determines the disease."
        )
        return [
            f"Facial findings (HP:0000271 and below) are a proxy for the photograph; no images were used. {face}",
            gene,
            "The note is the record's own text if it has one. Otherwise a template lists up to "
            f"{self.config.max_findings} present and {self.config.max_absent} absent coded findings.",
            "Records whose note names their own diagnosis are dropped. A name is correct only if its number agrees.",
            describe_random_lists(self.length, len(self.labels)),
        ]

    def _is_facial(self, item: Phenotype) -> bool:
        return self._ontology.is_a(item.id, FACE)

    def _most_specific(self, items: list[Phenotype], count: int) -> list[str]:
        ordered = sorted(items, key=lambda item: -self._ontology.specificity(item.id))
        return [lower_first(item.label) for item in ordered[:count]]

    def _mask_gene(self, text: str, record: Record) -> str:
        gene = record.fields.get("gene")
        if not gene or not self.config.hide_gene:
            return text
        return re.sub(rf"(?<!\w)(?:{'|'.join(map(re.escape, gene.split(';')))})(?!\w)", "[gene]", text)

    def _match(self, name: str) -> str:
        exact = self._by_name.get(normalize(name))
        own_id = OWN_ID.search(name)
        if exact is not None or own_id is None:
            return exact or ""
        label_id = self._by_name.get(normalize(name[: own_id.start()]), "")
        # a name followed by the id of another disease is ambiguous
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
    # 8, 11, 18 and 80 to 89 begin with a vowel sound
    article = "An" if number in (8, 11, 18) or 80 <= number <= 89 else "A"
    return f"{article} {number}-{unit}-old {noun}"


def _age(duration: str) -> tuple[int, str] | None:
    """Return the number and the name of the largest unit of an ISO 8601 duration; None for any other text."""
    units = parse_duration(duration)
    if units is None:
        return None
    named = zip(units, ("year", "month", "week", "day"), strict=True)
    return next(((number, unit) for number, unit in named if number), (0, "day"))


def _join(items: list[str], conjunction: str) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {conjunction} {items[-1]}"
