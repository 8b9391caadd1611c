"""Tabular features: coded fields and coded phenotypes as numbers, with encoders fitted on the training split.

They are not those of scikit-learn, which are saved by pickling: a saved teacher is JSON and safetensors.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from mint_ray.ontology import PHENOTYPIC_ABNORMALITY, load_ontology
from mint_ray.records import Record, duration_in_years
from mint_ray.teachers.ontology import phenotype_terms

Array = NDArray[np.float32]
Columns = NDArray[np.int64]

MIN_CATEGORY_RECORDS = 2
"""Minimum training records of a known category. Rarer ones count as unknown, so that its column is trained too."""
NUM_BINS = 8
"""Quantile bins of a number: it is also encoded as the number of bin edges that it exceeds, for nonlinear effects."""
ROW_NORM = 8.0
"""Norm of a record's phenotype features, whatever their number."""


@dataclasses.dataclass(frozen=True)
class NumericEncoder:
    """Encoder of a number: in standard deviations from the mean, and the quantile edges that it exceeds."""

    mean: float
    std: float
    edges: tuple[float, ...]

    size = NUM_BINS + 1
    """Number of columns: presence, the scaled number, one per edge."""

    @classmethod
    def fit(cls, numbers: Sequence[float]) -> NumericEncoder:
        """Return the encoder of the training split's numbers."""
        edges = np.quantile(numbers, np.arange(1, NUM_BINS) / NUM_BINS)
        return cls(float(np.mean(numbers)), float(np.std(numbers)) or 1.0, tuple(map(float, edges)))

    def transform(self, number: float) -> list[float]:
        """Return the columns of one number."""
        return [1.0, (number - self.mean) / self.std, *(float(number > edge) for edge in self.edges)]


@dataclasses.dataclass(frozen=True)
class CategoryEncoder:
    """One-hot encoder with a last column for unknown categories."""

    categories: tuple[str, ...]

    @property
    def size(self) -> int:
        """Number of columns."""
        return len(self.categories) + 1

    @classmethod
    def fit(cls, values: Sequence[str]) -> CategoryEncoder:
        """Return the encoder of the training split's categories."""
        counts = Counter(values)
        return cls(tuple(sorted(value for value, count in counts.items() if count >= MIN_CATEGORY_RECORDS)))

    def transform(self, value: str) -> list[float]:
        """Return the columns of one category."""
        row = [0.0] * self.size
        row[self.categories.index(value) if value in self.categories else -1] = 1.0
        return row


@dataclasses.dataclass(frozen=True)
class FieldsEncoder:
    """Encoder of several coded fields; a field that is missing or cannot be parsed is all zeros."""

    types: dict[str, str]
    encoders: dict[str, NumericEncoder | CategoryEncoder]

    @classmethod
    def fit(cls, types: Mapping[str, str], records: Sequence[Record]) -> FieldsEncoder:
        """Return the encoder of the fields in `types` that have a value in the training split."""
        encoders: dict[str, NumericEncoder | CategoryEncoder] = {}
        for name, kind in types.items():
            values = [value for value in (parse_field(record, name, kind) for record in records) if value is not None]
            if values:
                encoders[name] = CategoryEncoder.fit(values) if kind == "category" else NumericEncoder.fit(values)
        return cls(dict(types), encoders)

    @property
    def size(self) -> int:
        """Number of columns."""
        return sum(encoder.size for encoder in self.encoders.values())

    def transform(self, records: Sequence[Record]) -> tuple[Array, NDArray[np.bool_]]:
        """Return features (records, size), and a mask (records,) of those that have any of the fields."""
        rows = np.zeros((len(records), self.size), dtype=np.float32)
        present = np.zeros(len(records), dtype=bool)
        for i, record in enumerate(records):
            start = 0
            for name, encoder in self.encoders.items():
                value: Any = parse_field(record, name, self.types[name])
                if value is not None:
                    rows[i, start : start + encoder.size] = encoder.transform(value)
                    present[i] = True
                start += encoder.size
        return rows, present

    def to_json(self) -> dict[str, Any]:
        """Return the encoder as plain data."""
        encoders = {name: dataclasses.asdict(encoder) for name, encoder in self.encoders.items()}
        return {"types": self.types, "encoders": encoders}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FieldsEncoder:
        """Return the encoder that `to_json` wrote."""
        encoders: dict[str, NumericEncoder | CategoryEncoder] = {}
        for name, encoder in data["encoders"].items():
            if data["types"][name] == "category":
                encoders[name] = CategoryEncoder(tuple(encoder["categories"]))
            else:
                encoders[name] = NumericEncoder(encoder["mean"], encoder["std"], tuple(encoder["edges"]))
        return cls(data["types"], encoders)


def parse_field(record: Record, name: str, kind: str) -> Any:
    """Return a field as a string (`category`) or a finite number; a duration as log(1 + years).

    Returns None if the field is missing or cannot be parsed.
    """
    text = record.fields.get(name, "").strip()
    if not text:
        return None
    if kind == "category":
        return text
    if kind == "duration":
        years = duration_in_years(text)
        return None if years is None else math.log1p(years)
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


@dataclasses.dataclass(frozen=True)
class PhenotypeEncoder:
    """Encoder of phenotypes with one column per ontology term.

    An observed phenotype sets its term and all ancestors, an excluded one only a column of its own. The value is the
    term's information content: -log of the share of training records that have it.
    """

    observed: dict[str, float]
    excluded: dict[str, float]

    @classmethod
    def fit(cls, records: Sequence[Record]) -> PhenotypeEncoder:
        """Return the encoder of the training split's phenotypes."""
        observed: Counter[str] = Counter()
        excluded: Counter[str] = Counter()
        for record in records:
            observed.update(set().union(*(_ancestors(term) for term in phenotype_terms(record, excluded=False))))
            excluded.update(phenotype_terms(record, excluded=True))
        total = len(records) + 1

        def content(counts: Counter[str]) -> dict[str, float]:
            return {term: -math.log(count / total) for term, count in sorted(counts.items())}

        return cls(content(observed), content(excluded))

    @property
    def size(self) -> int:
        """Number of columns."""
        return len(self.observed) + len(self.excluded)

    @functools.cached_property
    def _column(self) -> dict[str, int]:
        names = [*self.observed, *(f"!{term}" for term in self.excluded)]
        return {name: column for column, name in enumerate(names)}

    @functools.cached_property
    def _values(self) -> Array:
        values = [*self.observed.values(), *(-value for value in self.excluded.values())]
        return np.array(values, dtype=np.float32)

    def columns(self, record: Record) -> list[Columns]:
        """Return the columns that each phenotype of a record sets, in a fixed order."""
        names = [_ancestors(term) for term in phenotype_terms(record, excluded=False)]
        names += [frozenset({f"!{term}"}) for term in phenotype_terms(record, excluded=True)]
        found = (sorted(self._column[name] for name in some if name in self._column) for some in names)
        return [np.array(columns, dtype=np.int64) for columns in found if columns]

    @functools.cached_property
    def organ_systems(self) -> frozenset[int]:
        """Columns of the organ systems: the terms directly below the root of all phenotypes."""
        parents = load_ontology().parents
        return frozenset(
            column for column, term in enumerate(self.observed) if PHENOTYPIC_ABNORMALITY in parents.get(term, ())
        )

    def transform(self, phenotypes: Sequence[Iterable[Columns]]) -> csr_matrix:
        """Return features (records, size) from the columns of each record's phenotypes; zeros if it has none."""
        columns_by_record = [np.unique(np.concatenate(list(some) or [np.zeros(0, np.int64)])) for some in phenotypes]
        num_records = len(columns_by_record)
        rows = np.repeat(np.arange(num_records), [len(columns) for columns in columns_by_record])
        columns = np.concatenate(columns_by_record) if columns_by_record else np.zeros(0, np.int64)
        values = self._values[columns]
        norm = np.sqrt(np.bincount(rows, weights=values.astype(np.float64) ** 2, minlength=num_records))
        scaled = (values * (ROW_NORM / np.maximum(norm, 1e-9))[rows]).astype(np.float32)
        return csr_matrix((scaled, (rows, columns)), shape=(num_records, self.size))

    def to_json(self) -> dict[str, Any]:
        """Return the encoder as plain data."""
        return {"observed": self.observed, "excluded": self.excluded}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PhenotypeEncoder:
        """Return the encoder that `to_json` wrote."""
        return cls(data["observed"], data["excluded"])


def _ancestors(term: str) -> frozenset[str]:
    return load_ontology().ancestors(term)
