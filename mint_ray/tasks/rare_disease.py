"""Ask for the rare diseases behind a clinical note, and read the list of names that comes back."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from itertools import pairwise

from mint_ray import storage
from mint_ray.loading import UserError
from mint_ray.ontology import FACE, Ontology, load_ontology, read_annotations
from mint_ray.records import Label, Message, Phenotype, Record
from mint_ray.tasks import Answer
from mint_ray.tasks.config import RareDisease

SYSTEM = "You are a genetic counsellor. Keep to the answer format."
HEADER = "POTENTIAL_DISEASES:"

ADULT_YEARS = 18
SHORT_NAME = 6
"""Up to this length a name in capitals is an abbreviation, which must stand in the note as written to count as told:
ALL and SHORT are also words."""

ROMAN_NUMERALS = "i ii iii iv v vi vii viii ix x xi xii xiii xiv xv xvi xvii xviii xix xx"
# without x, the x of X-linked
ROMAN = {roman: str(number) for number, roman in enumerate(ROMAN_NUMERALS.split(), start=1) if roman != "x"}
GENERIC = frozenset(
    """a an and the of with without or due to in by type form familial primary congenital hereditary autosomal dominant
    recessive x linked early late onset adult infantile juvenile neonatal childhood severe mild isolated syndrome
    syndromes disease diseases disorder disorders deficiency defect defects anomaly anomalies malformation malformations
    abnormality abnormalities condition""".split()  # noqa: SIM905 (a paragraph reads better than fifty lines)
)
"""Words that name no disease by themselves."""

TAIL_WORDS = ("with ", "without ", "due ", "associated ", "susceptibility")
NUMBERED = re.compile(r"^\W*(\d{1,3})\s*[.):]\s*(.*)$")
QUOTES = {"'": "'", '"': '"', "`": "`", "‘": "’", "“": "”", "«": "»", "’": "’", "”": "”"}  # fmt: skip
OWN_ID = re.compile(r"\s*[(\[]\s*((?:OMIM|MIM|ORPHA|MONDO)\W*\d+)\s*[)\]]\s*$", re.IGNORECASE)
NUMBER = r"(?:type\s+)?(?:\d+[a-z]{0,2}|[ivx]+[a-z]?|[a-z])"
"""A trailing number: `5`, `1A`, `type IV`, `type B`."""


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
        self._by_name = _index(labels)
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
            if _is_abbreviation(name):
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
        return [_lowered(item.label) for item in ordered[:most]]

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


def make_labels(names: Mapping[str, Sequence[str]], config: RareDisease) -> list[Label]:
    """See `mint_ray.tasks.make_labels`."""
    more = _annotated_names()
    given = _read_synonyms(config.synonyms) if config.synonyms else {}
    candidates: dict[str, dict[str, str]] = {}
    for label_id, known in names.items():
        preferred = known[0].split(";")[0].strip()
        found: dict[str, str] = {normalise(preferred): preferred}
        for name in [*known, *more.get(label_id, ()), *given.get(label_id, ())]:
            for part in (part.strip() for part in name.split(";")):
                for variant in (part, *inverted(part), re.sub(r"\s*\([^)]*\)$", "", part)):
                    if not GENERIC.issuperset(normalise(variant).split()):
                        found.setdefault(normalise(variant), variant)
        candidates[label_id] = found
    owners: dict[str, set[str]] = defaultdict(set)
    for label_id, found in candidates.items():
        for key in found:
            owners[key].add(label_id)
    labels = []
    for label_id, found in candidates.items():
        (_, preferred), *others = found.items()
        synonyms = [name for key, name in others if len(owners[key]) == 1]
        labels.append(Label(label_id=label_id, name=preferred, synonyms=synonyms))
    _index(labels)  # two labels of one name are an error here, not in training
    return labels


@lru_cache(maxsize=10_000)
def normalise(name: str) -> str:
    """The name with case, accents, punctuation, spaces, possessives, roman numerals and the word `type` before a number
    folded: `Neurofibromatosis, Type I` and `neurofibromatosis 1` are the same, `Noonan syndrome 1` and `5` are not."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", name.casefold()) if not unicodedata.combining(c))
    words = re.findall(r"[^\W_]+", re.sub(r"(?<=\w)['’]s\b", "", plain))
    folded = [ROMAN.get(word) or re.sub(r"^(i{1,3}|iv|vi{0,3}|ix)(?=[ab]$)", _arabic, word) for word in words]
    return " ".join(
        word
        for word, following in pairwise([*folded, ""])
        if not (word == "type" and (following[:1].isdigit() or len(following) == 1))
    )


def head(name: str) -> str:
    """What a disease is called without brackets, the part after the first comma, and a trailing number or letter:
    `Noonan syndrome` of `Noonan syndrome 5`, `Neurofibromatosis` of `Neurofibromatosis, type 1`."""
    words = re.sub(r"\s*\([^)]*\)$", "", name).split(",")[0].strip()
    return re.sub(rf"(?:\s+{NUMBER}|\s+type)+$", "", words, flags=re.IGNORECASE)


def inverted(name: str) -> list[str]:
    """The spoken forms of a name turned round its commas: `dilated cardiomyopathy 1A` of `Cardiomyopathy, dilated,
    1A`; none where the commas are those of a list."""
    first, *rest = [part.strip() for part in name.split(",")]
    if not rest or any(re.match(r"(and|or)\b", part) for part in rest):
        return []
    front, numbers, tail = [], [], []
    for part in rest:
        if part.startswith(TAIL_WORDS):
            tail.append(part)
            continue
        # a single letter counts as a number only after `type`: `vitamin D` keeps its D
        match = re.fullmatch(r"(.*?)\s*\b((?:type\s+)?\d+[A-Za-z]{0,2}|(?:type\s+)?[IVX]+[A-Za-z]?|type\s+[A-Z])", part)
        if match:
            numbers.append(match[2])
        front.append(match[1] if match else part)
    front = [part for part in front if part]
    orders = [front[::-1], front]
    forms = [" ".join([*order, _lowered(first), *numbers, *tail]) for order in orders]
    return list(dict.fromkeys(forms))


def _index(labels: Iterable[Label]) -> dict[str, str]:
    """Label id by normalised name, synonym and id."""
    by_name: dict[str, str] = {}
    for label in labels:
        for name in (label.name, label.label_id, *label.synonyms):
            key = normalise(name)
            if by_name.setdefault(key, label.label_id) != label.label_id:
                raise UserError(f"labels {by_name[key]} and {label.label_id} are both called {name!r}")
    return by_name


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


def _is_abbreviation(name: str) -> bool:
    return len(name) <= SHORT_NAME and name.upper() == name


def _arabic(match: re.Match[str]) -> str:
    return ROMAN[match[0]]


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


def _lowered(label: str) -> str:
    """A term as it stands inside a sentence: acronyms and names of persons keep their capital."""
    first = re.split(r"[\s/]", label, maxsplit=1)[0]
    if first[1:] != first[1:].lower() or first.split("-")[0].removesuffix("'s") in _proper_names(load_ontology()):
        return label
    # both sides of `Aplasia/Hypoplasia`
    return re.sub(r"(?<=/)[A-Z](?=[a-z])", lambda match: match[0].lower(), label[:1].lower() + label[1:])


@cache
def _proper_names(ontology: Ontology) -> frozenset[str]:
    """Words that the ontology writes with a capital inside a label and nowhere without."""
    inside = {
        word.strip("(),'").removesuffix("'s")
        for name in ontology.names.values()
        for word in re.split(r"[\s/-]", name)[1:]
    }
    return frozenset(word for word in inside if len(word) > 1 and word[0].isupper() and word.lower() not in inside)


def _join(items: list[str], conjunction: str) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {conjunction} {items[-1]}"


@cache
def _annotated_names() -> dict[str, list[str]]:
    """What the annotations call each disease, by disease id."""
    names: dict[str, dict[str, None]] = defaultdict(dict)
    for annotation in read_annotations():
        names[annotation.disease_id][annotation.disease_name] = None
    return {disease_id: list(found) for disease_id, found in names.items()}


def _read_synonyms(uri: str) -> dict[str, list[str]]:
    synonyms: dict[str, list[str]] = defaultdict(list)
    for where, row in _synonym_rows(uri):
        for column in ("label_id", "synonym"):
            if not isinstance(row.get(column), str) or not row[column].strip():
                raise UserError(f"{where}: {column}: expected a text, got {row.get(column)!r}")
        synonyms[row["label_id"]].append(row["synonym"].strip())
    return dict(synonyms)


def _synonym_rows(uri: str) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{uri}: cannot be read: {error}") from error
    if uri.endswith(".csv"):
        for number, row in enumerate(csv.DictReader(io.StringIO(text)), start=2):
            yield f"{uri}:{number}", row
        return
    if not uri.endswith(".jsonl"):
        raise UserError(f"{uri}: expected a name ending in .csv or .jsonl")
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{uri}:{number}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{uri}:{number}: expected an object, got {type(row).__name__}")
            yield f"{uri}:{number}", row
