"""Search space of a sweep: sample specs from it, enumerate its grid, and check it before anything runs.

`draw` is used instead of Optuna's distributions because a choice may contain sections with ranges of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mint_ray.config.loader import UserError, from_data, replace, resources_of
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.config.sweep import RANGES, AnyRange, Choice, Float, Int

Suggest = Callable[[str, Float | Int | Sequence[Any]], Any]
"""Function that returns the value of a named parameter: a number of a range, or one of the names of a choice."""

FIXED_SECTIONS = {
    "root": "is the place of the sweep's artifacts",
    "title": "changes no result",
    "prepare": "defines the validation split, so trials would be evaluated on different records",
    "evaluate": "defines how trials are evaluated",
}
"""Sections that a sweep must not vary, with the reason."""


def draw(space: Mapping[str, AnyRange], suggest: Suggest) -> dict[str, Any]:
    """Return one point of the space: changes to the spec by dotted path.

    A parameter is named by its path. A parameter inside a member of a choice is named by path, member and key, such as
    `pair.sampler[margin].margin`.
    """
    return {path: _draw(path, parameter, suggest) for path, parameter in space.items()}


def grid(space: Mapping[str, AnyRange]) -> Iterator[dict[str, Any]]:
    """Yield every combination as parameter to value; the last parameter changes first. Raises UserError."""
    indices: list[int] = []
    sizes: list[int] = []
    picked: dict[str, Any] = {}

    def suggest(name: str, parameter: Float | Int | Sequence[Any]) -> Any:
        values = grid_values(name, parameter)
        index = indices[len(sizes)] if len(sizes) < len(indices) else 0
        sizes.append(len(values))
        picked[name] = values[index]
        return values[index]

    while True:
        sizes.clear()
        picked.clear()
        draw(space, suggest)
        yield dict(picked)
        # itertools.product does not fit: which parameters follow depends on the members picked before them
        indices += [0] * (len(sizes) - len(indices))
        while indices and indices[-1] + 1 >= sizes[len(indices) - 1]:
            indices.pop()
        if not indices:
            return
        indices[-1] += 1


def grid_values(name: str, parameter: Float | Int | Sequence[Any]) -> list[Any]:
    """Return the values that a grid search tries for one parameter. Raises UserError for a range without a number."""
    match parameter:
        case Float(low=low, high=high, num_points=num_points, log=log):
            if num_points is None:
                raise UserError(f"sweep.space.{name}: a grid search needs num_points, the number of values to try")
            shares = [index / (num_points - 1) for index in range(num_points)]
            return [low * (high / low) ** share if log else low + (high - low) * share for share in shares]
        case Int(low=first, high=last, step=step):
            return list(range(first, last + 1, step))
        case _:
            return list(parameter)


def member_names(choice: Choice) -> list[Any]:
    """Return the names of a choice's members in the study: plain values as they are, sections by their `kind`.

    A section whose `kind` is missing or not unique is named by its JSON.
    """
    kinds = [member.get("kind") if isinstance(member, dict) else None for member in choice.choices]
    return [
        member
        if member is None or isinstance(member, bool | int | float | str)
        else kind
        if isinstance(kind, str) and kinds.count(kind) == 1
        else json.dumps(member, sort_keys=True)
        for member, kind in zip(choice.choices, kinds, strict=True)
    ]


def check_space(config: PipelineConfig, space: Mapping[str, AnyRange]) -> None:
    """Raise UserError naming the path and the value that the spec does not accept; values are tried one at a time."""
    for path, parameter in space.items():
        keys = path.split(".")
        if keys[0] in FIXED_SECTIONS:
            raise UserError(f"sweep.space.{path}: cannot be varied: {keys[0]} {FIXED_SECTIONS[keys[0]]}")
        if any(f"{path}.".startswith(f"{section}.") for section in resources_of(config)):
            raise UserError(f"sweep.space.{path}: cannot be varied: resources change no result")
        parent = next((other for other in space if path.startswith(f"{other}.")), None)
        if parent is not None:
            raise UserError(f"sweep.space.{path}: is inside {parent}, which is varied too; move it into its choices")
        for value in _extremes(path, parameter):
            try:
                replace(config, {path: value})
            except UserError as error:
                message = str(error).splitlines()[0]
                for prefix in (f"change {path!r}: ", "config: ", f"{path}: "):
                    message = message.removeprefix(prefix)
                raise UserError(f"sweep.space.{path}: {message}") from error


def _draw(name: str, parameter: AnyRange, suggest: Suggest) -> Any:
    if isinstance(parameter, Choice):
        names = member_names(parameter)
        picked = suggest(name, names)
        return _fill(f"{name}[{picked}]", parameter.choices[names.index(picked)], suggest)
    return suggest(name, parameter)


def _fill(name: str, member: Any, suggest: Suggest) -> Any:
    """Return the member with a value for every range in it."""
    if isinstance(member, dict):
        if member.get("kind") in RANGES:
            return _draw(name, from_data(RANGES[member["kind"]], member, f"sweep.space.{name}"), suggest)
        return {key: _fill(f"{name}.{key}", value, suggest) for key, value in member.items()}
    if isinstance(member, list | tuple):
        return [_fill(f"{name}.{index}", value, suggest) for index, value in enumerate(member)]
    return member


def _extremes(path: str, parameter: AnyRange) -> Iterator[Any]:
    """Yield both bounds of a range, and every member of a choice with its inner parameters at both bounds."""
    if not isinstance(parameter, Choice):
        yield parameter.low
        yield parameter.high
        return
    for name in member_names(parameter):
        for end in (0, -1):

            def suggest(at: str, inner: Float | Int | Sequence[Any], name: Any = name, end: int = end) -> Any:
                if at == path:
                    return name
                return (inner.low, inner.high)[end] if isinstance(inner, Float | Int) else inner[end]

            yield _draw(path, parameter, suggest)
