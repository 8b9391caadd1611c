"""Names of diseases: preferred names, synonyms, and when two names are the same."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache
from itertools import pairwise

from mint_ray import storage
from mint_ray.config.loader import UserError
from mint_ray.ontology import Ontology, load_ontology, read_annotations
from mint_ray.records import Label
from mint_ray.tasks.config import RareDisease
from mint_ray.tasks.numbered_lists import fold_accents, index_names

MAX_ABBREVIATION_LENGTH = 6
"""Up to this length a name in capitals is an abbreviation; it is found in a note only in capitals, for ALL and SHORT
are also words."""

ROMAN_NUMERALS = "i ii iii iv v vi vii viii ix x xi xii xiii xiv xv xvi xvii xviii xix xx"
# without x, the x of X-linked
ROMAN = {roman: str(number) for number, roman in enumerate(ROMAN_NUMERALS.split(), start=1) if roman != "x"}
GENERIC = frozenset(
    """a an and the of with without or due to in by type form familial primary congenital hereditary autosomal dominant
    recessive x linked early late onset adult infantile juvenile neonatal childhood severe mild isolated syndrome
    syndromes disease diseases disorder disorders deficiency defect defects anomaly anomalies malformation malformations
    abnormality abnormalities condition""".split()  # noqa: SIM905 (a paragraph reads better than fifty lines)
)
"""Words that do not name a disease by themselves."""

TAIL_WORDS = ("with ", "without ", "due ", "associated ", "susceptibility")
NUMBER = r"(?:type\s+)?(?:\d+[a-z]{0,2}|[ivx]+[a-z]?|[a-z])"
"""A trailing number: `5`, `1A`, `type IV`, `type B`."""


def name_diseases(names: Mapping[str, Sequence[str]], config: RareDisease) -> list[Label]:
    """Return the labels of `mint_ray.tasks.make_labels`."""
    annotated = _annotated_names()
    given = _read_synonyms(config.synonyms) if config.synonyms else {}
    candidates: dict[str, dict[str, str]] = {}
    for label_id, known in names.items():
        preferred = known[0].split(";")[0].strip()
        found: dict[str, str] = {normalize(preferred): preferred}
        for name in [*known, *annotated.get(label_id, ()), *given.get(label_id, ())]:
            for part in (part.strip() for part in name.split(";")):
                for variant in (part, *spoken_forms(part), re.sub(r"\s*\([^)]*\)$", "", part)):
                    if not GENERIC.issuperset(normalize(variant).split()):
                        found.setdefault(normalize(variant), variant)
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
    index_names(labels, normalize)  # raises for two labels of one name before any work
    return labels


@lru_cache(maxsize=10_000)
def normalize(name: str) -> str:
    """Return the name without differences of case, accents, punctuation, spaces, possessives and roman numerals.

    The word `type` before a number is dropped too: `Neurofibromatosis, Type I` and `neurofibromatosis 1` are the same,
    `Noonan syndrome 1` and `Noonan syndrome 5` are not.
    """
    words = re.findall(r"[^\W_]+", re.sub(r"(?<=\w)['’]s\b", "", fold_accents(name)))
    folded = [
        ROMAN.get(word) or re.sub(r"^(i{1,3}|iv|vi{0,3}|ix)(?=[ab]$)", lambda match: ROMAN[match[0]], word)
        for word in words
    ]
    return " ".join(
        word
        for word, following in pairwise([*folded, ""])
        if not (word == "type" and (following[:1].isdigit() or len(following) == 1))
    )


def base_name(name: str) -> str:
    """Return the name without brackets, the part after the first comma, and a trailing number or letter.

    `Noonan syndrome` for `Noonan syndrome 5`, `Neurofibromatosis` for `Neurofibromatosis, type 1`.
    """
    words = re.sub(r"\s*\([^)]*\)$", "", name).split(",")[0].strip()
    return re.sub(rf"(?:\s+{NUMBER}|\s+type)+$", "", words, flags=re.IGNORECASE)


def spoken_forms(name: str) -> list[str]:
    """Return an inverted name in spoken word order: `dilated cardiomyopathy 1A` for `Cardiomyopathy, dilated, 1A`.

    The list is empty if there are no commas, or if they separate the items of a list.
    """
    first, *rest = [part.strip() for part in name.split(",")]
    if not rest or any(re.match(r"(and|or)\b", part) for part in rest):
        return []
    front, numbers, tail = [], [], []
    for part in rest:
        if part.startswith(TAIL_WORDS):
            tail.append(part)
            continue
        # a single letter is a number only after `type`: the D of `vitamin D` is not
        match = re.fullmatch(r"(.*?)\s*\b((?:type\s+)?\d+[A-Za-z]{0,2}|(?:type\s+)?[IVX]+[A-Za-z]?|type\s+[A-Z])", part)
        if match:
            numbers.append(match[2])
        front.append(match[1] if match else part)
    front = [part for part in front if part]
    orders = [front[::-1], front]
    forms = [" ".join([*order, lower_first(first), *numbers, *tail]) for order in orders]
    return list(dict.fromkeys(forms))


def is_abbreviation(name: str) -> bool:
    """Return whether a name is short and in capitals, so that it must match exactly."""
    return len(name) <= MAX_ABBREVIATION_LENGTH and name.upper() == name


@lru_cache(maxsize=20_000)
def lower_first(label: str) -> str:
    """Return a term as it is written inside a sentence; acronyms and names of persons keep their capital."""
    first = re.split(r"[\s/]", label, maxsplit=1)[0]
    if first[1:] != first[1:].lower() or first.split("-")[0].removesuffix("'s") in _proper_names(load_ontology()):
        return label
    # both sides of `Aplasia/Hypoplasia`
    return re.sub(r"(?<=/)[A-Z](?=[a-z])", lambda match: match[0].lower(), label[:1].lower() + label[1:])


@cache
def _proper_names(ontology: Ontology) -> frozenset[str]:
    """Return the words that the ontology always writes with a capital inside a label."""
    inside = {
        word.strip("(),'").removesuffix("'s")
        for name in ontology.names.values()
        for word in re.split(r"[\s/-]", name)[1:]
    }
    return frozenset(word for word in inside if len(word) > 1 and word[0].isupper() and word.lower() not in inside)


@cache
def _annotated_names() -> dict[str, list[str]]:
    """Return the names of each disease in the annotations, by disease id."""
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
