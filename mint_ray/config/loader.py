"""Turn YAML and `a.b=c` overrides into frozen dataclasses, and back into plain data."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import hashlib
import inspect
import itertools
import json
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

from pydantic import Field, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

T = TypeVar("T")

# created once per class: that takes a third of a second for a root config
_adapter: Callable[[Any], TypeAdapter[Any]] = functools.cache(TypeAdapter)

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
    decorated = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    decorated.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    return decorated


class Resources:
    """Base of settings classes with worker counts, batch sizes and the like, which never change a fingerprint."""


def load(cls: type[T], path: str | Path, overrides: Sequence[str] = (), layers: Sequence[str | Path] = ()) -> T:
    """Read `cls` from a YAML file, with partial files and overrides such as `train.trainer.beta=0.2` merged into it.

    A mapping in a layer is merged key by key, unless it changes the section's `kind`; anything else replaces the value.

    Args:
        cls: Settings class of the root.
        path: YAML file.
        overrides: Dotted paths and their values as YAML, in order; they win over files.
        layers: Partial YAML files, in order.

    Raises:
        UserError: A value is invalid; names the file or override, the dotted path, the value and, for an unknown key,
            the most similar known one.
    """
    data = _with_source(read_yaml(path), str(path))
    for layer in layers:
        data = _with_default_kinds(cls, data, str(path))
        _merge(data, _with_source(read_yaml(layer), str(layer)))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"override {override!r}: expected a.b=c")
        try:
            value = YAML(typ="safe", pure=True).load(text)
        except YAMLError as error:
            raise UserError(f"override {override!r}: not YAML: {one_line(error)}") from error
        source = f"override {override!r}"
        _set(data, key.split("."), _with_source(value, source), source)
    return _build(cls, data, source=str(path))


def from_data(cls: type[T], data: Any, source: str = "config") -> T:
    """Build `cls` from plain data; `source` names the data in errors. Raises UserError."""
    return _build(cls, _with_source(data, source), source)


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
    """Return the resolved config as plain data that `from_data` reads back."""
    return typing.cast(dict[str, Any], _adapter(type(config)).dump_python(config, mode="json"))


def iter_leaves(data: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and the value of every leaf of a dumped config; an empty section is a leaf."""
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from iter_leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def replace(config: T, changes: Mapping[str, Any]) -> T:
    """Return a copy of `config` with the values at dotted paths changed, validated as if loaded. Raises UserError."""
    data = _with_source(dump(config), "config")
    for path, value in changes.items():
        _set(data, path.split("."), _with_source(value, "config"), f"change {path!r}")
    return _build(type(config), data, "config")


def without_resources(value: Any, data: Any = None) -> Any:
    """Return plain data of a config, or of a structure that contains configs, without their `Resources` sections.

    The type of a section decides, not its key: a user's own option named `resources` is kept.

    Args:
        value: A settings object, plain data, or mappings and lists of both.
        data: Plain data of the same structure to return instead of `value`'s own.
    """
    if _is_settings(value):
        data = dump(value) if data is None else data
        fields = {key: getattr(value, key) for key in data}
        return {
            key: without_resources(fields[key], item)
            for key, item in data.items()
            if not isinstance(fields[key], Resources)
        }
    if isinstance(value, Mapping):
        return {key: without_resources(item, None if data is None else data[key]) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [None] * len(value) if data is None else data
        return [without_resources(item, plain) for item, plain in zip(value, items, strict=True)]
    return value if data is None else data


def resources_of(value: Any, path: str = "") -> dict[str, Any]:
    """Return the plain data of each `Resources` section of a config, or a mapping of configs, by its dotted path."""
    if isinstance(value, Resources):
        return {path: dump(value)}
    if _is_settings(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    found: dict[str, Any] = {}
    if isinstance(value, Mapping):
        for key, item in value.items():
            found |= resources_of(item, f"{path}.{key}" if path else str(key))
    return found


def fingerprint(*parts: Any) -> str:
    """Return twelve hex digits that identify `parts`: configs without their resources, and plain data."""
    text = json.dumps([without_resources(part) for part in parts], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def json_schema(cls: type[Any]) -> dict[str, Any]:
    """Return the JSON Schema of a settings class, with the docstrings of its fields as descriptions."""
    schema = _adapter(cls).json_schema()
    for section in _sections(cls, set()):
        # pydantic adds the module to names that several classes have
        long_name = f"{section.__module__}.{section.__qualname__}".replace(".", "__")
        part = schema if section is cls else schema["$defs"].get(section.__name__) or schema["$defs"][long_name]
        for key, text in _field_docstrings(section).items():
            part["properties"][key].setdefault("description", text)
    return schema


def _field_docstrings(cls: type[Any]) -> dict[str, str]:
    """Return the docstring under each field of a settings class, also of inherited fields.

    Pydantic could read them, but would do so whenever a config is loaded: most of the time that this takes.
    """
    found: dict[str, str] = {}
    for base in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        [definition] = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        for field, text in itertools.pairwise(typing.cast(ast.ClassDef, definition).body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                match text:
                    case ast.Expr(ast.Constant(str(docstring))):
                        found[field.target.id] = inspect.cleandoc(docstring)
    return found


def _sections(annotation: Any, found: set[type[Any]]) -> set[type[Any]]:
    """Add every settings class in an annotation, and in the fields of those classes, to `found`."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation) and annotation not in found:
        found.add(annotation)
        for hint in typing.get_type_hints(annotation, include_extras=True).values():
            _sections(hint, found)
    for argument in typing.get_args(annotation):
        _sections(argument, found)
    return found


def _is_settings(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


@dataclasses.dataclass(frozen=True, slots=True)
class _Sourced:
    """A value other than a mapping, and the file or override that it comes from."""

    value: Any
    source: str


def _with_source(data: Any, source: str) -> Any:
    """Return `data` with every value other than a mapping as a `_Sourced`."""
    if isinstance(data, dict):
        return {key: _with_source(value, source) for key, value in data.items()}
    return _Sourced(data, source)


def _without_source(data: Any) -> Any:
    return {key: _without_source(value) for key, value in data.items()} if isinstance(data, dict) else data.value


def _merge(base: dict[str, Any], layer: dict[str, Any]) -> None:
    for key, value in layer.items():
        below = base.get(key)
        if isinstance(below, dict) and isinstance(value, dict) and not _changes_kind(below, value):
            _merge(below, value)
        else:
            base[key] = value


def _changes_kind(base: dict[str, Any], layer: dict[str, Any]) -> bool:
    # in the base, every section of a union has its kind
    return "kind" in base and "kind" in layer and _without_source(base["kind"]) != _without_source(layer["kind"])


def _set(data: dict[str, Any], keys: list[str], value: Any, source: str) -> None:
    for key in keys[:-1]:
        section = data.setdefault(key, {})
        if not isinstance(section, dict):
            raise UserError(f"{source}: {key} is {section.value!r}, not a section")
        data = section
    data[keys[-1]] = value


def _build(cls: type[T], data: Any, source: str) -> T:
    # JSON in strict mode: lists become tuples, yet "5" is no number and true is no 1
    try:
        plain = _without_source(_with_default_kinds(cls, data, source))
        return typing.cast(T, _adapter(cls).validate_json(json.dumps(plain, default=str), strict=True))
    except ValidationError as error:
        lines = []
        for item in error.errors(include_url=False):
            path, text = _explain(cls, item)
            origin = _sources_of(data, path, text) or source
            lines.append(": ".join([origin, *([".".join(path)] if path else []), text]))
        raise UserError("\n".join(lines)) from error


def _with_default_kinds(cls: Any, data: Any, source: str) -> Any:
    """Return `data` with the default's `kind` in each section of a union without one: `a.beta=1` needs no `a.kind`."""
    if not isinstance(data, dict) or not dataclasses.is_dataclass(cls):
        return data
    hints, filled = typing.get_type_hints(cls, include_extras=True), dict(data)
    for field in dataclasses.fields(cls):
        section = data.get(field.name)
        members = [member for member in _members(hints[field.name]) if dataclasses.is_dataclass(member)]
        if not isinstance(section, dict) or not members:
            continue
        default: Any = field.default
        if len(members) > 1 and "kind" not in section and hasattr(default, "kind"):
            section = {"kind": _Sourced(default.kind, source), **section}
        kind = _without_source(section["kind"]) if "kind" in section else None
        chosen = [member for member in members if len(members) == 1 or _tag(member) == kind]
        filled[field.name] = _with_default_kinds(chosen[0], section, source) if chosen else section
    return filled


def _sources_of(data: Any, path: Sequence[str], text: str) -> str:
    """Return the sources of the value at `path`; of a section, those of the keys in `text`; "" for the whole data."""
    part = data
    for key in path:
        if not isinstance(part, dict) or key not in part:
            break
        part = part[key]
    if isinstance(part, dict):
        words = set(re.findall(r"\w+", text))
        part = {key: value for key, value in part.items() if key in words} or part
    return "" if part is data else ", ".join(dict.fromkeys(_all_sources(part)))


def _all_sources(data: Any) -> Iterator[str]:
    if isinstance(data, dict):
        for value in data.values():
            yield from _all_sources(value)
    else:
        yield data.source


def _explain(cls: type[Any], error: Any) -> tuple[list[str], str]:
    """Return the path of an error as the user wrote it, and an explanation."""
    loc, kind = error["loc"], error["type"]
    path, owner = _resolve_path(cls, loc)
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


def _resolve_path(cls: Any, loc: tuple[Any, ...]) -> tuple[list[str], Any]:
    """Return the path of an error as the user wrote it (without union tags), and the class that owns its last key."""
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
