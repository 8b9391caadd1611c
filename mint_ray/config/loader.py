"""Turn YAML and `a.b=c` overrides into frozen dataclasses, and back into plain data."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

from pydantic import Field, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

T = TypeVar("T")

# made once a class: that takes a third of a second for a root config
_adapter: Callable[[Any], TypeAdapter[Any]] = functools.cache(TypeAdapter)

RESOURCES = "resources"
"""Sections of this name hold worker counts and batch sizes; they never change a fingerprint."""

TRACEBACK = re.compile(r"^\s*File \"[^\n]+\", line \d+", re.MULTILINE)
MAX_LINE = 500
"""Maximum length of an unexpected error's message on one line, in characters."""


class UserError(ValueError):
    """Invalid input or configuration that the user can fix: one line, exit code 2, no traceback."""


def one_line(error: BaseException, *, with_type: bool = False) -> str:
    """Return the message of `error` on one line; the name of its type if it has no message.

    An error that Ray wraps is unwrapped first. A message that contains a traceback gives its last line.

    Args:
        error: Any error.
        with_type: Put the error's type in front of the message, unless it is a `UserError`.
    """
    wrapped = getattr(error, "cause", None)
    if wrapped is None and type(error).__module__.startswith("ray."):
        wrapped = error.__cause__
    if isinstance(wrapped, BaseException):
        return one_line(wrapped, with_type=with_type)
    text, name = str(error), type(error).__name__
    if TRACEBACK.search(text):
        text = text.strip().splitlines()[-1]
    message = " ".join(text.split())
    if isinstance(error, UserError):
        return message
    if len(message) > MAX_LINE:
        message = f"{message[: MAX_LINE - 3]}..."
    return f"{name}: {message}" if with_type and message else message or name


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, Field))
def settings(cls: type[T]) -> type[T]:
    """Make `cls` a frozen keyword-only dataclass that refuses unknown keys when it is loaded.

    A class variable `renamed_keys` maps keys of earlier versions to their new names, for the error of an old key.
    """
    made = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    made.__pydantic_config__ = {"extra": "forbid", "use_attribute_docstrings": True}  # type: ignore[attr-defined]
    return made


def load(cls: type[T], path: str | Path, overrides: Sequence[str] = (), layers: Sequence[str | Path] = ()) -> T:
    """Read `cls` from a YAML file, partial files `layers` and overrides such as `train.trainer.beta=0.2` laid over it.

    A mapping of a layer is merged key by key with what lies below, unless it changes its `kind`; all else replaces.
    Raises UserError naming where the value came from (file or override), the dotted path, the value and, for an
    unknown key, the nearest one.
    """
    said = _say(read_yaml(path), str(path))
    for layer in layers:
        said = _with_default_kinds(cls, said, str(path))
        _lay_over(said, _say(read_yaml(layer), str(layer)))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"override {override!r}: expected a.b=c")
        try:
            value = YAML(typ="safe", pure=True).load(text)
        except YAMLError as error:
            raise UserError(f"override {override!r}: not YAML: {one_line(error)}") from error
        where = f"override {override!r}"
        _put(said, key.split("."), _say(value, where), where)
    return _build(cls, said, where=str(path))


def from_data(cls: type[T], data: Any, where: str = "config") -> T:
    """Build `cls` from plain data; `where` names the file in errors. Raises UserError."""
    return _build(cls, _say(data, where), where)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read one YAML 1.2 mapping; a repeated key is an error. Raises UserError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from error
    try:
        data = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise UserError(f"{path}: not YAML: {one_line(error)}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping of sections, got {type(data).__name__}")
    return data


def dump(config: Any) -> dict[str, Any]:
    """The resolved config as plain data that `from_data` reads back."""
    return typing.cast(dict[str, Any], _adapter(type(config)).dump_python(config, mode="json"))


def replace(config: T, changes: Mapping[str, Any]) -> T:
    """A copy of `config` with dotted paths changed, checked as if it had been loaded so."""
    said = _say(dump(config), "config")
    for key, value in changes.items():
        _put(said, key.split("."), _say(value, "config"), f"change {key!r}")
    return _build(type(config), said, "config")


def fingerprint(*parts: Any) -> str:
    """Twelve hex digits that name the content of `parts` (plain data), `resources` sections left out."""
    text = json.dumps([_without_resources(part) for part in parts], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def json_schema(cls: type[Any]) -> dict[str, Any]:
    """JSON Schema of a config class, field docstrings as descriptions."""
    return _adapter(cls).json_schema()


@dataclasses.dataclass(frozen=True, slots=True)
class _Said:
    """A value that is no mapping, and the file or override that says it."""

    value: Any
    where: str


def _say(data: Any, where: str) -> Any:
    """`data` with every value that is no mapping as a `_Said`."""
    return {key: _say(value, where) for key, value in data.items()} if isinstance(data, dict) else _Said(data, where)


def _unsay(said: Any) -> Any:
    return {key: _unsay(value) for key, value in said.items()} if isinstance(said, dict) else said.value


def _lay_over(below: dict[str, Any], above: dict[str, Any]) -> None:
    for key, value in above.items():
        under = below.get(key)
        if isinstance(under, dict) and isinstance(value, dict) and not _changes_kind(under, value):
            _lay_over(under, value)
        else:
            below[key] = value


def _changes_kind(below: dict[str, Any], above: dict[str, Any]) -> bool:
    # below, every section of a union has its kind
    return "kind" in below and "kind" in above and _unsay(below["kind"]) != _unsay(above["kind"])


def _put(said: dict[str, Any], keys: list[str], value: Any, where: str) -> None:
    for key in keys[:-1]:
        below = said.setdefault(key, {})
        if not isinstance(below, dict):
            raise UserError(f"{where}: {key} is {below.value!r}, not a section")
        said = below
    said[keys[-1]] = value


def _build(cls: type[T], said: Any, where: str) -> T:
    # JSON in strict mode: lists become tuples, yet "5" is no number and true is no 1
    try:
        plain = _unsay(_with_default_kinds(cls, said, where))
        return typing.cast(T, _adapter(cls).validate_json(json.dumps(plain, default=str), strict=True))
    except ValidationError as error:
        lines = []
        for item in error.errors(include_url=False):
            path, text = _explain(cls, item)
            lines.append(": ".join([_speakers(said, path, text) or where, *([".".join(path)] if path else []), text]))
        raise UserError("\n".join(lines)) from error


def _with_default_kinds(cls: Any, said: Any, where: str) -> Any:
    """`said` with the default's `kind` in every section of a union that states none: `a.beta=1` needs no `a.kind`."""
    if not isinstance(said, dict) or not dataclasses.is_dataclass(cls):
        return said
    hints, filled = typing.get_type_hints(cls, include_extras=True), dict(said)
    for field in dataclasses.fields(cls):
        section = said.get(field.name)
        members = [member for member in _members(hints[field.name]) if dataclasses.is_dataclass(member)]
        if not isinstance(section, dict) or not members:
            continue
        default: Any = field.default
        if len(members) > 1 and "kind" not in section and hasattr(default, "kind"):
            section = {"kind": _Said(default.kind, where), **section}
        kind = _unsay(section["kind"]) if "kind" in section else None
        chosen = [member for member in members if len(members) == 1 or _tag(member) == kind]
        filled[field.name] = _with_default_kinds(chosen[0], section, where) if chosen else section
    return filled


def _speakers(said: Any, path: Sequence[str], text: str) -> str:
    """Who said what stands at `path`; of a section, the keys that `text` names; "" where that would be everybody."""
    part = said
    for key in path:
        if not isinstance(part, dict) or key not in part:
            break
        part = part[key]
    if isinstance(part, dict):
        words = set(re.findall(r"\w+", text))
        part = {key: value for key, value in part.items() if key in words} or part
    return "" if part is said else ", ".join(dict.fromkeys(_every_speaker(part)))


def _every_speaker(said: Any) -> Iterator[str]:
    if isinstance(said, dict):
        for value in said.values():
            yield from _every_speaker(value)
    else:
        yield said.where


def _without_resources(part: Any) -> Any:
    if isinstance(part, dict):
        return {key: _without_resources(value) for key, value in part.items() if key != RESOURCES}
    if isinstance(part, list | tuple):
        return [_without_resources(value) for value in part]
    return part


def _explain(cls: type[Any], error: Any) -> tuple[list[str], str]:
    """Where an error lies, as the user wrote it, and what it is."""
    loc, kind = error["loc"], error["type"]
    path, owner = _walk(cls, loc)
    value = f"got {error['input']!r}"
    if kind == "unexpected_keyword_argument":
        known = [field.name for field in dataclasses.fields(owner)] if owner else []
        renamed = getattr(owner, "renamed_keys", {}).get(str(loc[-1]))
        near = [renamed] if renamed else difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return path, f"unknown key ({value}); {hint}"
    if kind == "missing":
        return path, "required, and not given"
    if kind == "union_tag_invalid":
        tag, expected = error["ctx"]["tag"], error["ctx"]["expected_tags"]
        near = difflib.get_close_matches(tag, [name.strip(" '") for name in expected.split(",")], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {expected}"
        return [*path, "kind"], f"got {tag!r}; {hint}"
    if kind == "union_tag_not_found":
        return [*path, "kind"], "required, and not given"
    if kind == "value_error":
        return path, str(error["ctx"]["error"])
    return path, f"{error['msg'][0].lower()}{error['msg'][1:]}, {value}"


def _walk(cls: Any, loc: tuple[Any, ...]) -> tuple[list[str], Any]:
    """The path of an error as the user wrote it (union tags left out), and the class that owns its last key."""
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
    return path, owner


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
