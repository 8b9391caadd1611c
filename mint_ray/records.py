"""Rows that stages exchange, and their Arrow schemas."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import re
import typing
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import pyarrow as pa

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = typing.get_args(Split)

Row = TypeVar("Row")

# once per class: resolving the hints takes longer than reading a row
_hints: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Phenotype:
    """One coded finding: an ontology term that was observed, or examined and found absent (`excluded`)."""

    id: str
    label: str
    excluded: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One input case with separate modalities; the task selects those that the student may see."""

    record_id: str
    group_id: str
    """Patient or publication; a group is in one split."""
    label_id: str | None = None
    """True label, if known."""
    split: Split = "train"
    text: str | None = None
    phenotypes: list[Phenotype] = dataclasses.field(default_factory=list)
    image_uri: str | None = None
    fields: dict[str, str] = dataclasses.field(default_factory=dict)
    """Coded fields such as `age` (ISO 8601 duration), `sex` and `gene`."""
    citations: list[str] = dataclasses.field(default_factory=list)
    """Publications that report this case, such as `PMID:123`."""

    @property
    def needs_text(self) -> bool:
        """True for a record with an image and no text."""
        return self.image_uri is not None and self.text is None


TEXT_ID, TEXT_SIMILARITY = "text_id", "text_similarity"
"""Fields of a record whose text was matched to its image: id of the text, and cosine similarity."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CandidateText:
    """A text that can be matched to images of its split."""

    text_id: str
    group_id: str
    split: Split
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TextEmbedding:
    """Embedding of a candidate text, of norm 1."""

    text_id: str
    split: Split
    vector: list[float]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Label:
    """One candidate answer."""

    label_id: str
    name: str
    synonyms: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TeacherScores:
    """A teacher's ranking of every label for one record, best first."""

    record_id: str
    split: Split
    teacher: str
    labels: list[str]
    """Label ids, best first."""
    scores: list[float]
    """Descending, one per label; larger is better."""
    status: Literal["ok", "failed"] = "ok"
    reason: str | None = None
    agreement: float | None = None
    """Share of an ensemble's members with a ranking that rank the same label first as the ensemble; None for a single
    teacher."""
    silent: list[str] = dataclasses.field(default_factory=list)
    """Members of an ensemble that could not score the record, with the reason: `ontology 1: no_known_phenotype`."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a conversation, in the format of TRL and of chat templates."""

    role: str
    content: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PreferencePair:
    """One preference in TRL's conversational columns, with its origin."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    record_id: str
    split: Split
    teacher: str
    sampler: str
    chosen_labels: list[str]
    rejected_labels: list[str]
    chosen_scores: list[float] = dataclasses.field(default_factory=list)
    """The teacher's score of each label of `chosen_labels`."""
    rejected_scores: list[float] = dataclasses.field(default_factory=list)
    difficulty: float | None = None
    """Difficulty of the pair, 0 (easy) to 1 (hard): 1 - (mean of `chosen_scores` - mean of `rejected_scores`) / (best -
    worst score of the record), at most 1; 1 if all scores are equal. None for a pair that no sampler drew."""
    image_uri: str | None = None
    """Image before the first user message; None for a text student."""
    note_span: list[int] | None = None
    """[start, end) of the note in the last message of the prompt, in characters; None if it is not part of it."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedRecord:
    """One record's pairs as tokens: a prompt, distinct completions, and pairs of these."""

    record_id: str
    prompt_ids: list[int]
    completions: list[list[int]]
    pairs: list[list[int]]
    """[chosen, rejected] as indices into `completions`."""
    reference_logps: list[float] | None = None
    """Log-probability of each completion under the base student; None for an objective without a reference model."""
    image_uri: str | None = None
    """Image of the prompt, for which `prompt_ids` contain placeholders; None for a text student."""


Mode = Literal["free", "constrained", "rank"]
"""Way of answering: free text, constrained decoding, or a ranking of all labels."""
MODE_SUFFIXES: dict[Mode, str] = {"free": "", "constrained": ", constrained", "rank": ", ranked"}
"""Ending of a method's title by its mode."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """Identity of a row of results: the model that answered, and how it answered."""

    student: Literal["teacher", "base", "aligned"]
    """Model that answered; the teacher for comparison."""
    retrieval: bool = False
    """True if the student read retrieved passages ahead of the note."""
    mode: Mode = "free"
    ablated: str | None = None
    """Modality that the teacher was scored without; None for all modalities and for students."""

    @property
    def key(self) -> str:
        """Short name for file names and dictionary keys, such as `aligned-retrieval-rank`."""
        parts = [self.student, "retrieval" if self.retrieval else "", "" if self.mode == "free" else self.mode]
        return "-".join([part for part in parts if part] + ([f"without_{self.ablated}"] if self.ablated else []))

    @property
    def title(self) -> str:
        """Name for people, such as `aligned student with passages, ranked`."""
        name = "teacher" if self.student == "teacher" else f"{self.student} student"
        name += f" without {self.ablated}" if self.ablated else ""
        name += " with passages" if self.retrieval else ""
        return name + MODE_SUFFIXES[self.mode]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """One method's answer for one record; the first four fields after the id are those of `Method`."""

    record_id: str
    student: Literal["teacher", "base", "aligned"]
    retrieval: bool = False
    mode: Mode = "free"
    ablated: str | None = None
    labels: list[str]
    """Label ids in the order of the answer, "" for a hallucinated label; all labels for a ranking."""
    text: str
    """The answer as generated; empty for a teacher or a ranking."""
    reason: str | None = None
    """Reason for which the answer could not be parsed; `labels` is then empty."""
    scores: list[float] = dataclasses.field(default_factory=list)
    """Probability of each label of `labels`, for methods that rank all labels; they sum to 1."""

    @property
    def method(self) -> Method:
        """Identity of the method that gave the answer."""
        return Method(student=self.student, retrieval=self.retrieval, mode=self.mode, ablated=self.ablated)


def schema_of(row: type[Any]) -> pa.Schema:
    """Return the Arrow schema of a row class; a column of nulls keeps its type."""
    hints = _hints(row)
    return pa.schema([_field(field.name, hints[field.name]) for field in dataclasses.fields(row)])


def to_table(rows: list[Any], row: type[Any]) -> pa.Table:
    """Return rows of one class as an Arrow table with the schema of that class."""
    hints = _hints(row)
    # by column: four times as fast for pairs as through dicts
    columns = [
        _to_array(hints[field.name], list(map(operator.attrgetter(field.name), rows)))
        for field in dataclasses.fields(row)
    ]
    return pa.Table.from_arrays(columns, schema=schema_of(row))


def from_dict(row: type[Row], values: dict[str, Any]) -> Row:
    """Return one Arrow row (`to_pylist`) as an instance of `row`."""
    hints = _hints(row)
    return row(**{name: _restore(hints[name], value) for name, value in values.items()})


def from_table(row: type[Row], table: pa.Table) -> list[Row]:
    """Return all rows of an Arrow table. Raises ValueError if its schema is not that of `row`."""
    if not table.schema.equals(schema_of(row)):
        raise ValueError(f"expected the columns of {row.__name__}, got {table.schema.to_string()}")
    hints = _hints(row)
    columns = [_to_values(hints[name], table[name].combine_chunks()) for name in table.column_names]
    return _instances(row, table.column_names, columns)


def _field(name: str, annotation: Any) -> pa.Field:
    inner, nullable = _strip_optional(annotation)
    return pa.field(name, _arrow(inner), nullable=nullable)


_ARROW_TYPES: dict[Any, pa.DataType] = {str: pa.string(), float: pa.float64(), bool: pa.bool_(), int: pa.int64()}


def _arrow(annotation: Any) -> pa.DataType:
    if annotation in _ARROW_TYPES:
        return _ARROW_TYPES[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return pa.string()
    if origin is list:
        return pa.list_(_arrow(arguments[0]))
    if origin is dict:
        return pa.map_(pa.string(), _arrow(arguments[1]))
    if dataclasses.is_dataclass(annotation):
        hints = _hints(annotation)
        inner = {field.name: _strip_optional(hints[field.name])[0] for field in dataclasses.fields(annotation)}
        return pa.struct([pa.field(name, _arrow(hint)) for name, hint in inner.items()])
    raise TypeError(f"no Arrow type for {annotation!r}")


def _to_array(annotation: Any, values: list[Any]) -> pa.Array:
    """Return the column of a field, from its values in all rows."""
    inner, _ = _strip_optional(annotation)
    if typing.get_origin(inner) is list:
        ends = itertools.accumulate((len(value or ()) for value in values), initial=0)
        flat = _to_array(typing.get_args(inner)[0], [item for value in values for item in value or ()])
        mask = pa.array([value is None for value in values]) if None in values else None
        return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), flat, type=_arrow(inner), mask=mask)
    if dataclasses.is_dataclass(inner):
        hints = _hints(inner)
        columns = [
            _to_array(hints[field.name], [getattr(value, field.name) for value in values])
            for field in dataclasses.fields(inner)
        ]
        return pa.StructArray.from_arrays(columns, fields=list(_arrow(inner)))
    return pa.array(values, _arrow(inner))


def _to_values(annotation: Any, column: pa.Array) -> list[Any]:
    """Return the values of a field in all rows, from its column: the inverse of `_to_array`."""
    inner, _ = _strip_optional(annotation)
    origin = typing.get_origin(inner)
    if origin is list:
        flat = _to_values(typing.get_args(inner)[0], column.flatten())
        lengths = column.value_lengths().to_pylist()
        ends = itertools.accumulate(length or 0 for length in lengths)
        return [None if length is None else flat[end - length : end] for length, end in zip(lengths, ends, strict=True)]
    if dataclasses.is_dataclass(inner):
        hints = _hints(inner)
        names = [field.name for field in column.type]
        return _instances(
            inner, names, [_to_values(hints[name], part) for name, part in zip(names, column.flatten(), strict=True)]
        )
    values: list[Any] = column.to_pylist()
    if origin is dict:
        return [None if value is None else dict(value) for value in values]
    return values


def _instances(row: Any, names: list[str], columns: list[list[Any]]) -> list[Any]:
    return [row(**dict(zip(names, values, strict=True))) for values in zip(*columns, strict=True)]


def _restore(annotation: Any, value: Any) -> Any:
    inner, _ = _strip_optional(annotation)
    origin, arguments = typing.get_origin(inner), typing.get_args(inner)
    if origin is dict and value is not None:
        return dict(value)
    if origin is list and value is not None and dataclasses.is_dataclass(arguments[0]):
        item_class: Any = arguments[0]
        return [item_class(**item) for item in value]
    return value


def _strip_optional(annotation: Any) -> tuple[Any, bool]:
    arguments = typing.get_args(annotation)
    if type(None) in arguments:
        return next(argument for argument in arguments if argument is not type(None)), True
    return annotation, False


_DURATION = re.compile(r"P(?=.)(?:(\d+)Y)?(?:(\d+)M)?(?:(\d+)W)?(?:(\d+)D)?(?:T.*)?")
_YEARS_PER_UNIT = (1.0, 1 / 12, 7 / 365.25, 1 / 365.25)


def parse_duration(text: str) -> tuple[int, int, int, int] | None:
    """Return years, months, weeks and days of an ISO 8601 duration such as `P3Y6M`; None for any other text.

    Hours, minutes and seconds are ignored.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        return None
    years, months, weeks, days = (int(number or 0) for number in match.groups())
    return years, months, weeks, days


def duration_in_years(text: str) -> float | None:
    """Return the years of an ISO 8601 duration; None for any other text."""
    units = parse_duration(text)
    if units is None:
        return None
    return sum(number * years for number, years in zip(units, _YEARS_PER_UNIT, strict=True))
