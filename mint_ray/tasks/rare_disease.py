"""Ask for the rare diseases behind a clinical note, and read the list of names that comes back."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence

from mint_ray.ontology import FACE, load_ontology
from mint_ray.records import Label, Message, Phenotype, Record
from mint_ray.tasks import Answer
from mint_ray.tasks.config import RareDisease
from mint_ray.tasks.names import GENERIC, head, index_names, is_abbreviation, lowered, normalise

SYSTEM = "You are a genetic counsellor. Keep to the answer format."
HEADER = "POTENTIAL_DISEASES:"

ADULT_YEARS = 18
NUMBERED = re.compile(r"^\W*(\d{1,3})\s*[.):]\s*(.*)$")
QUOTES = {"'": "'", '"': '"', "`": "`", "‘": "’", "“": "”", "«": "»", "’": "’", "”": "”"}  # fmt: skip
OWN_ID = re.compile(r"\s*[(\[]\s*((?:OMIM|MIM|ORPHA|MONDO)\W*\d+)\s*[)\]]\s*$", re.IGNORECASE)


class RareDiseaseTask:
    """The student reads sex, age and findings outside the face; facial findings stand in for a photograph."""

    modalities: tuple[str, ...] = ("face", "body")

    def __init__(self, config: RareDisease, labels: Sequence[Label], length: int) -> None:
        if length < 1:
            raise ValueError(f"length must be positive, got {length}")
        self.config = config
        self.labels: tuple[Label, ...] = tuple(labels)
        self.length = length
        self._by_id = {label.label_id: label for label in labels}
        self._by_name = index_names(labels)
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
        skeleton = "\n".join(f"{number}. ''" for number in range(1, self.length + 1))
        request = f"{what}, best first, exactly as:\n{HEADER}\n{skeleton}"
        return [
            Message(role="system", content=SYSTEM),
            Message(role="user", content=f"{self.note(record)}\n\n{request}"),
        ]

    def answer(self, label_ids: Sequence[str]) -> str:
        names = [self._by_id[label_id].name for label_id in label_ids]
        return "\n".join([HEADER, *(f"{number}. '{name}'" for number, name in enumerate(names, start=1))])

    def parse(self, text: str) -> Answer:
        if not text.strip():
            return Answer(reason="empty")
        names = list(_listed(text))
        if not names:
            return Answer(reason="no_list")
        if len(names) > self.length:
            # a longer list has more chances to be right than were asked for
            return Answer(reason="too_many")
        return Answer(labels=[self._match(name) for name in names], names=names)

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


def _listed(text: str) -> Iterator[str]:
    """The names of the first numbered list, after the header if there is one."""
    parts = re.split(r"potential[ _]diseases\W*?:", text, flags=re.IGNORECASE)
    for line in (parts[1] if len(parts) > 1 else parts[0]).splitlines():
        if match := NUMBERED.match(line.strip()):
            yield _unquoted(match[2].strip())


def _unquoted(entry: str) -> str:
    """The quoted name an entry opens with, or else the entry without emphasis and a closing full stop."""
    entry = entry.strip("*_ ").rstrip(".,; ")
    closing = QUOTES.get(entry[:1])
    if closing is None:
        return entry
    inside = entry[1:]
    if inside.endswith(closing):
        return inside[:-1].strip()
    # an apostrophe inside the name is followed by a letter, a closing quote is not
    end = re.search(rf"{re.escape(closing)}(?!\w)", inside)
    return (inside[: end.start()] if end else inside).strip()


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
