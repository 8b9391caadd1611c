"""The rows that flow from stage to stage, and their Arrow schemas."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import pyarrow as pa

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = typing.get_args(Split)

Row = TypeVar("Row")

# asked for once a class: working them out takes longer than reading a row
_hints: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Phenotype:
    """One coded finding: an ontology term that was observed, or looked for and found absent."""

    id: str
    label: str
    excluded: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One input case with its modalities kept apart; the task says which of them the student may see."""

    record_id: str
    group_id: str
    """The person or the publication; splits are by group."""
    label_id: str | None = None
    """The known true label."""
    split: Split = "train"
    text: str | None = None
    phenotypes: list[Phenotype] = dataclasses.field(default_factory=list)
    image_uri: str | None = None
    fields: dict[str, str] = dataclasses.field(default_factory=dict)
    """Coded fields such as `age` (ISO 8601 duration), `sex` and `gene`."""
    citations: list[str] = dataclasses.field(default_factory=list)
    """Publications that report this case, such as `PMID:123`."""


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
    """Share of an ensemble's members that put the same label first as the ensemble, of those that answered; None for a
    single teacher."""
    silent: list[str] = dataclasses.field(default_factory=list)
    """Members of an ensemble that could not score the record, and why, such as `ontology 1: no_known_phenotype`."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a conversation, in the form of TRL and the chat templates."""

    role: str
    content: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PreferencePair:
    """One preference in TRL's conversational columns, with where it came from."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    record_id: str
    split: Split
    teacher: str
    sampler: str
    chosen_labels: list[str]
    rejected_labels: list[str]
    note_span: list[int] | None = None
    """[start, end) of the note in the last message of the prompt, in characters; None where it does not stand there."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedRecord:
    """One record's pairs as the student reads them: a prompt, distinct completions, and which is preferred to which."""

    record_id: str
    prompt_ids: list[int]
    completions: list[list[int]]
    pairs: list[list[int]]
    """[chosen, rejected] as indices into `completions`."""
    reference_logps: list[float] | None = None
    """Log-probability of each completion under the base student; None unless the objective compares with it."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """One method's answer for one record."""

    record_id: str
    method: str
    labels: list[str]
    """Label ids in the order named; an empty string where a name is no label of the task."""
    text: str
    """The answer as generated; empty for a teacher."""
    reason: str | None = None
    """Why the answer could not be read; `labels` is then empty."""


def schema_of(row: type[Any]) -> pa.Schema:
    """The Arrow schema of a row class, so that a column of nulls keeps its type."""
    hints = _hints(row)
    return pa.schema([_field(field.name, hints[field.name]) for field in dataclasses.fields(row)])


def to_table(rows: list[Any], row: type[Any]) -> pa.Table:
    """Rows of one class as an Arrow table of that class's schema."""
    return pa.Table.from_pylist([dataclasses.asdict(item) for item in rows], schema=schema_of(row))


def from_dict(row: type[Row], values: dict[str, Any]) -> Row:
    """One Arrow row (`to_pylist`) as an instance of `row`."""
    hints = _hints(row)
    return row(**{name: _revive(hints[name], value) for name, value in values.items()})


def from_table(row: type[Row], table: pa.Table) -> list[Row]:
    """All rows of an Arrow table. Raises ValueError if its schema is not that of `row`."""
    if not table.schema.equals(schema_of(row)):
        raise ValueError(f"expected the columns of {row.__name__}, got {table.schema.to_string()}")
    return [from_dict(row, values) for values in table.to_pylist()]


def _field(name: str, annotation: Any) -> pa.Field:
    inner, nullable = _strip_optional(annotation)
    return pa.field(name, _arrow(inner), nullable=nullable)


def _arrow(annotation: Any) -> pa.DataType:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is str or origin is Literal:
        return pa.string()
    if annotation is float:
        return pa.float64()
    if annotation is bool:
        return pa.bool_()
    if annotation is int:
        return pa.int64()
    if origin is list:
        return pa.list_(_arrow(arguments[0]))
    if origin is dict:
        return pa.map_(pa.string(), _arrow(arguments[1]))
    if dataclasses.is_dataclass(annotation):
        hints = _hints(annotation)
        inner = {field.name: _strip_optional(hints[field.name])[0] for field in dataclasses.fields(annotation)}
        return pa.struct([pa.field(name, _arrow(hint)) for name, hint in inner.items()])
    raise TypeError(f"no Arrow type for {annotation!r}")


def _revive(annotation: Any, value: Any) -> Any:
    inner, _ = _strip_optional(annotation)
    origin, arguments = typing.get_origin(inner), typing.get_args(inner)
    if origin is dict and value is not None:
        return dict(value)
    if origin is list and value is not None and dataclasses.is_dataclass(arguments[0]):
        make: Any = arguments[0]
        return [make(**item) for item in value]
    return value


def _strip_optional(annotation: Any) -> tuple[Any, bool]:
    arguments = typing.get_args(annotation)
    if type(None) in arguments:
        return next(argument for argument in arguments if argument is not type(None)), True
    return annotation, False
