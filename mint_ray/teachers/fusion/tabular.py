"""Write coded fields and coded findings as numbers, in a code that the training split alone decides."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from mint_ray.ontology import PHENOTYPIC_ABNORMALITY, load_ontology
from mint_ray.records import Record

Array = NDArray[np.float32]

LEAST_RECORDS = 2
"""A word that fewer training records have is as good as unknown, so that the place of the unknown is learned too."""
STEPS = 8
"""A number is also told by how many of the training split's eighths it has passed, for what is not linear in it."""
LENGTH = 8.0
"""Of the row of a record's findings, so that many findings speak no louder than few."""
DURATION = re.compile(r"P(?=.)(?:(\d+)Y)?(?:(\d+)M)?(?:(\d+)W)?(?:(\d+)D)?(?:T.*)?")
YEARS = (1.0, 1 / 12, 7 / 365.25, 1 / 365.25)


@dataclasses.dataclass(frozen=True)
class NumberCode:
    """A number as multiples of the standard deviation from the mean, and how many of the limits it has passed."""

    mean: float
    deviation: float
    limits: tuple[float, ...]

    width = STEPS + 1  # whether it is there, the number, the limits

    @classmethod
    def learn(cls, numbers: Sequence[float]) -> NumberCode:
        limits = np.quantile(numbers, np.arange(1, STEPS) / STEPS)
        return cls(float(np.mean(numbers)), float(np.std(numbers)) or 1.0, tuple(map(float, limits)))

    def write(self, number: float) -> list[float]:
        passed = [float(number > limit) for limit in self.limits]
        return [1.0, (number - self.mean) / self.deviation, *passed]


@dataclasses.dataclass(frozen=True)
class WordCode:
    """A word of the vocabulary, or an unknown one."""

    words: tuple[str, ...]

    @property
    def width(self) -> int:
        return len(self.words) + 1

    @classmethod
    def learn(cls, words: Sequence[str]) -> WordCode:
        counts = Counter(words)
        return cls(tuple(sorted(word for word, count in counts.items() if count >= LEAST_RECORDS)))

    def write(self, word: str) -> list[float]:
        row = [0.0] * self.width
        row[self.words.index(word) if word in self.words else -1] = 1.0
        return row


@dataclasses.dataclass(frozen=True)
class FieldsCode:
    """Coded fields side by side; one that a record lacks, or that cannot be read, is all zeros."""

    kinds: dict[str, str]
    codes: dict[str, NumberCode | WordCode]

    @classmethod
    def learn(cls, kinds: Mapping[str, str], records: Sequence[Record]) -> FieldsCode:
        codes: dict[str, NumberCode | WordCode] = {}
        for name, kind in kinds.items():
            values = [value for value in (read_field(record, name, kind) for record in records) if value is not None]
            if values:
                codes[name] = WordCode.learn(values) if kind == "category" else NumberCode.learn(values)
        return cls(dict(kinds), codes)

    @property
    def width(self) -> int:
        return sum(code.width for code in self.codes.values())

    def write(self, records: Sequence[Record]) -> tuple[Array, NDArray[np.bool_]]:
        """(records, width) numbers, and which records have any field at all."""
        rows = np.zeros((len(records), self.width), dtype=np.float32)
        known = np.zeros(len(records), dtype=bool)
        for i, record in enumerate(records):
            start = 0
            for name, code in self.codes.items():
                value: Any = read_field(record, name, self.kinds[name])
                if value is not None:
                    rows[i, start : start + code.width] = code.write(value)
                    known[i] = True
                start += code.width
        return rows, known

    def to_json(self) -> dict[str, Any]:
        return {"kinds": self.kinds, "codes": {name: dataclasses.asdict(code) for name, code in self.codes.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FieldsCode:
        codes: dict[str, NumberCode | WordCode] = {}
        for name, code in data["codes"].items():
            if data["kinds"][name] == "category":
                codes[name] = WordCode(tuple(code["words"]))
            else:
                codes[name] = NumberCode(code["mean"], code["deviation"], tuple(code["limits"]))
        return cls(data["kinds"], codes)


def read_field(record: Record, name: str, kind: str) -> Any:
    """The field as a word or as a finite number (a duration as log(1 + years)); None where it is not there or no such
    thing."""
    text = record.fields.get(name, "").strip()
    if not text:
        return None
    if kind == "category":
        return text
    if kind == "duration":
        match = DURATION.fullmatch(text)
        if match is None:
            return None
        return math.log1p(sum(int(n) * years for n, years in zip(match.groups(), YEARS, strict=True) if n))
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


@dataclasses.dataclass(frozen=True)
class FindingsCode:
    """Findings as places of ontology terms: observed ones with all that they are a kind of, excluded ones alone.

    A place is worth the term's information content: -log of the share of training records that have it.
    """

    observed: dict[str, float]
    excluded: dict[str, float]

    @classmethod
    def learn(cls, records: Sequence[Record]) -> FindingsCode:
        observed: Counter[str] = Counter()
        excluded: Counter[str] = Counter()
        for record in records:
            observed.update(set().union(*(_above(term) for term in _terms(record, excluded=False))))
            excluded.update(_terms(record, excluded=True))
        whole = len(records) + 1

        def content(counts: Counter[str]) -> dict[str, float]:
            return {term: -math.log(count / whole) for term, count in sorted(counts.items())}

        return cls(content(observed), content(excluded))

    @property
    def width(self) -> int:
        return len(self.observed) + len(self.excluded)

    @functools.cached_property
    def _place(self) -> dict[str, int]:
        names = [*self.observed, *(f"!{term}" for term in self.excluded)]
        return {name: place for place, name in enumerate(names)}

    @functools.cached_property
    def _worth(self) -> Array:
        return np.array([*self.observed.values(), *(-worth for worth in self.excluded.values())], dtype=np.float32)

    def places(self, record: Record) -> list[NDArray[np.int64]]:
        """For each finding of a record the places that it fills, in a fixed order."""
        named = [_above(term) for term in _terms(record, excluded=False)]
        named += [frozenset({f"!{term}"}) for term in _terms(record, excluded=True)]
        found = (sorted(self._place[name] for name in names if name in self._place) for names in named)
        return [np.array(places, dtype=np.int64) for places in found if places]

    @functools.cached_property
    def systems(self) -> frozenset[int]:
        """The places of the organ systems: the terms right below the root of all findings."""
        parents = load_ontology().parents
        return frozenset(
            place for place, term in enumerate(self.observed) if PHENOTYPIC_ABNORMALITY in parents.get(term, ())
        )

    def write(self, findings: Sequence[Iterable[NDArray[np.int64]]]) -> csr_matrix:
        """(records, width) from the places of each record's findings; a record of none is a row of zeros."""
        filled = [np.unique(np.concatenate(list(places) or [np.zeros(0, np.int64)])) for places in findings]
        rows = np.repeat(np.arange(len(filled)), [len(places) for places in filled])
        columns = np.concatenate(filled) if filled else np.zeros(0, np.int64)
        worth = self._worth[columns]
        norm = np.sqrt(np.bincount(rows, weights=worth.astype(np.float64) ** 2, minlength=len(filled)))
        scaled = (worth * (LENGTH / np.maximum(norm, 1e-9))[rows]).astype(np.float32)
        return csr_matrix((scaled, (rows, columns)), shape=(len(filled), self.width))

    def to_json(self) -> dict[str, Any]:
        return {"observed": self.observed, "excluded": self.excluded}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FindingsCode:
        return cls(data["observed"], data["excluded"])


def _terms(record: Record, *, excluded: bool) -> list[str]:
    """The record's findings as current ids of real findings, each once, in a fixed order."""
    ontology = load_ontology()
    resolved = {ontology.resolve(item.id) for item in record.phenotypes if item.excluded == excluded}
    return sorted(term for term in resolved if term and ontology.is_a(term, PHENOTYPIC_ABNORMALITY))


def _above(term: str) -> frozenset[str]:
    return load_ontology().ancestors(term)
