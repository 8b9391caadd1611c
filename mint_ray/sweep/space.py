"""Draw specs from a space, lay out its grid, and say what is wrong with it before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mint_ray.config.loader import RESOURCES, UserError, from_data, replace
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.config.sweep import RANGES, AnyRange, Choice, Float, Int

Suggest = Callable[[str, Float | Int | Sequence[Any]], Any]
"""Gives the value of a named parameter: a number of a range, or one of a choice's names."""

YARDSTICKS = {
    "root": "is where the sweep lies",
    "title": "changes no result",
    "prepare": "decides which records are held out, so trials would not be judged on the same ones",
    "evaluate": "is how trials are judged",
}
"""Sections that a sweep must not vary, and why."""


def draw(space: Mapping[str, AnyRange], suggest: Suggest) -> dict[str, Any]:
    """One spec of the space: what to change, by dotted path.

    A parameter is named by its path; what stands inside a choice's member by path, member and key, as in
    `pair.sampler[margin].margin`.
    """
    return {path: _draw(path, varied, suggest) for path, varied in space.items()}


def grid(space: Mapping[str, AnyRange]) -> Iterator[dict[str, Any]]:
    """Every combination as parameter to value, the last parameter changing first. Raises UserError."""
    script: list[int] = []
    options: list[int] = []
    picked: dict[str, Any] = {}

    def suggest(name: str, varied: Float | Int | Sequence[Any]) -> Any:
        values = grid_values(name, varied)
        place = script[len(options)] if len(options) < len(script) else 0
        options.append(len(values))
        picked[name] = values[place]
        return values[place]

    while True:
        options.clear()
        picked.clear()
        draw(space, suggest)
        yield dict(picked)
        # an odometer whose later wheels depend on where the earlier ones stand
        script += [0] * (len(options) - len(script))
        while script and script[-1] + 1 >= options[len(script) - 1]:
            script.pop()
        if not script:
            return
        script[-1] += 1


def grid_values(name: str, varied: Float | Int | Sequence[Any]) -> list[Any]:
    """What a grid tries of one parameter. Raises UserError for a range that has no end of values."""
    match varied:
        case Float(low=low, high=high, points=points, log=log):
            if points is None:
                raise UserError(f"sweep.space.{name}: a grid needs points, the number of values to try")
            shares = [place / (points - 1) for place in range(points)]
            return [low * (high / low) ** share if log else low + (high - low) * share for share in shares]
        case Int(low=first, high=last, step=step):
            return list(range(first, last + 1, step))
        case _:
            return list(varied)


def names_of(choice: Choice) -> list[Any]:
    """How the members are called in the study: sections by their kind where that tells them apart, plain values as
    they are."""
    kinds = [member.get("kind") if isinstance(member, dict) else None for member in choice.of]
    return [
        member
        if member is None or isinstance(member, bool | int | float | str)
        else kind
        if isinstance(kind, str) and kinds.count(kind) == 1
        else json.dumps(member, sort_keys=True)
        for member, kind in zip(choice.of, kinds, strict=True)
    ]


def check_space(config: PipelineConfig, space: Mapping[str, AnyRange]) -> None:
    """Raise UserError naming the path and the value that the spec would not take, tried one at a time."""
    for path, varied in space.items():
        keys = path.split(".")
        if keys[0] in YARDSTICKS:
            raise UserError(f"sweep.space.{path}: {keys[0]} {YARDSTICKS[keys[0]]}")
        if RESOURCES in keys:
            raise UserError(f"sweep.space.{path}: resources change no result, so there is nothing to find")
        around = next((other for other in space if path.startswith(f"{other}.")), None)
        if around is not None:
            raise UserError(f"sweep.space.{path}: lies in {around}, which is varied too; say it among its members")
        for value in _extremes(path, varied):
            try:
                replace(config, {path: value})
            except UserError as error:
                said = str(error).splitlines()[0]
                for prefix in (f"change {path!r}: ", "config: ", f"{path}: "):
                    said = said.removeprefix(prefix)
                raise UserError(f"sweep.space.{path}: {said}") from error


def _draw(name: str, varied: AnyRange, suggest: Suggest) -> Any:
    if isinstance(varied, Choice):
        names = names_of(varied)
        picked = suggest(name, names)
        return _fill(f"{name}[{picked}]", varied.of[names.index(picked)], suggest)
    return suggest(name, varied)


def _fill(name: str, member: Any, suggest: Suggest) -> Any:
    """The member with a value drawn for every range in it."""
    if isinstance(member, dict):
        if member.get("kind") in RANGES:
            return _draw(name, from_data(RANGES[member["kind"]], member, f"sweep.space.{name}"), suggest)
        return {key: _fill(f"{name}.{key}", value, suggest) for key, value in member.items()}
    if isinstance(member, list | tuple):
        return [_fill(f"{name}.{place}", value, suggest) for place, value in enumerate(member)]
    return member


def _extremes(path: str, varied: AnyRange) -> Iterator[Any]:
    """Both ends of a range; of a choice every member, with everything inside it at its low and at its high end."""
    if not isinstance(varied, Choice):
        yield varied.low
        yield varied.high
        return
    for name in names_of(varied):
        for end in (0, -1):

            def suggest(at: str, inner: Float | Int | Sequence[Any], name: Any = name, end: int = end) -> Any:
                if at == path:
                    return name
                return (inner.low, inner.high)[end] if isinstance(inner, Float | Int) else inner[end]

            yield _draw(path, varied, suggest)
