"""Turn YAML and `a.b=c` overrides into frozen dataclasses, and back into plain data."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

from pydantic import Field, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

T = TypeVar("T")

RESOURCES = "resources"
"""Sections of this name hold worker counts and batch sizes; they never change a fingerprint."""


class UserError(ValueError):
    """Something the user can mend: one line, exit code 2, no traceback."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, Field))
def settings(cls: type[T]) -> type[T]:
    """Make `cls` a frozen keyword-only dataclass that refuses unknown keys when it is loaded."""
    made = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    made.__pydantic_config__ = {"extra": "forbid", "use_attribute_docstrings": True}  # type: ignore[attr-defined]
    return made


def load(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read `cls` from a YAML file with overrides such as `train.trainer.beta=0.2` laid over it.

    Raises UserError naming the file, the dotted path, the value and, for an unknown key, the nearest one.
    """
    data = read_yaml(path)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"override {override!r}: expected a.b=c")
        try:
            value = YAML(typ="safe", pure=True).load(text)
        except YAMLError as error:
            raise UserError(f"override {override!r}: not YAML: {_one_line(error)}") from error
        _put(data, key.split("."), value, override)
    return from_data(cls, data, where=str(path))


def from_data(cls: type[T], data: Any, where: str = "config") -> T:
    """Build `cls` from plain data; `where` names the file in errors. Raises UserError."""
    # JSON in strict mode: lists become tuples, yet "5" is no number and true is no 1
    try:
        return TypeAdapter(cls).validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        lines = [_explain(cls, item) for item in error.errors(include_url=False)]
        raise UserError("\n".join(f"{where}: {line}" for line in lines)) from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read one YAML 1.2 mapping; a repeated key is an error. Raises UserError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {_one_line(error)}") from error
    try:
        data = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise UserError(f"{path}: not YAML: {_one_line(error)}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping of sections, got {type(data).__name__}")
    return data


def dump(config: Any) -> dict[str, Any]:
    """The resolved config as plain data that `from_data` reads back."""
    return typing.cast(dict[str, Any], TypeAdapter(type(config)).dump_python(config, mode="json"))


def replace(config: T, changes: Mapping[str, Any]) -> T:
    """A copy of `config` with dotted paths changed, checked as if it had been loaded so."""
    data = dump(config)
    for key, value in changes.items():
        _put(data, key.split("."), value, key)
    return from_data(type(config), data)


def fingerprint(*parts: Any) -> str:
    """Twelve hex digits that name the content of `parts` (plain data), `resources` sections left out."""
    text = json.dumps([_without_resources(part) for part in parts], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def json_schema(cls: type[Any]) -> dict[str, Any]:
    """JSON Schema of a config class, field docstrings as descriptions."""
    return TypeAdapter(cls).json_schema()


def _put(data: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        below = data.setdefault(key, {})
        if not isinstance(below, dict):
            raise UserError(f"override {override!r}: {key} is {below!r}, not a section")
        data = below
    data[keys[-1]] = value


def _without_resources(part: Any) -> Any:
    if isinstance(part, dict):
        return {key: _without_resources(value) for key, value in part.items() if key != RESOURCES}
    if isinstance(part, list | tuple):
        return [_without_resources(value) for value in part]
    return part


def _explain(cls: type[Any], error: Any) -> str:
    loc, kind = error["loc"], error["type"]
    path, owner = _walk(cls, loc)
    value = f"got {error['input']!r}"
    if kind == "unexpected_keyword_argument":
        known = [field.name for field in dataclasses.fields(owner)] if owner else []
        near = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{path}: unknown key ({value}); {hint}"
    if kind == "missing":
        return f"{path}: required, and not given"
    if kind == "union_tag_invalid":
        tag, expected = error["ctx"]["tag"], error["ctx"]["expected_tags"]
        near = difflib.get_close_matches(tag, [name.strip(" '") for name in expected.split(",")], n=1, cutoff=0.5)
        return f"{path}.kind: got {tag!r}; {f'did you mean {near[0]!r}?' if near else f'expected one of {expected}'}"
    if kind == "union_tag_not_found":
        return f"{path}.kind: required, and not given"
    if kind == "value_error":
        return f"{path}: {error['ctx']['error']}" if path else str(error["ctx"]["error"])
    return f"{path}: {error['msg'][0].lower()}{error['msg'][1:]}, {value}"


def _walk(cls: Any, loc: tuple[Any, ...]) -> tuple[str, Any]:
    """The dotted path of an error as the user wrote it (union tags left out), and the class that owns its last key."""
    path: list[str] = []
    owner: Any = None
    current = cls
    for part in loc:
        members = {_tag(member): member for member in _members(current)}
        if part in members and len(members) > 1:
            current = members[part]
            continue
        classes = [member for member in _members(current) if dataclasses.is_dataclass(member)]
        owner = classes[0] if classes else None
        hints = typing.get_type_hints(owner, include_extras=True) if owner else {}
        arguments = typing.get_args(current)
        current = (
            hints.get(part) if owner else (arguments[-2 if arguments[-1] is Ellipsis else -1] if arguments else None)
        )
        path.append(str(part))
    return ".".join(path), owner


def _members(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) is typing.Annotated:
        yield from _members(typing.get_args(annotation)[0])
    elif isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        for member in typing.get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _tag(member: Any) -> Any:
    if not dataclasses.is_dataclass(member):
        return None
    kind = typing.get_type_hints(member).get("kind")
    return typing.get_args(kind)[0] if kind else member


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
