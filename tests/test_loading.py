from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from mint_ray.loading import UserError, dump, fingerprint, from_data, json_schema, load, replace, settings


@settings
class Fast:
    kind: Literal["fast"] = "fast"
    rate: float = 1.0
    """Steps per second."""


@settings
class Slow:
    kind: Literal["slow"] = "slow"
    steps: tuple[int, ...] = ()


@settings
class Resources:
    workers: int = 1


@settings
class Root:
    trainer: Annotated[Fast | Slow, Field(discriminator="kind")] = Fast()
    name: str = "x"
    resources: Resources = Resources()

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name must not be empty, got ''")


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    return path


def test_overrides_are_laid_over_the_file_and_scientific_notation_is_a_number(tmp_path: Path) -> None:
    path = write(tmp_path, "trainer: {kind: fast, rate: 5e-4}\n")
    assert load(Root, path).trainer == Fast(rate=5e-4)
    assert load(Root, path, ["trainer.rate=1e-3", "name=no"]) == Root(trainer=Fast(rate=1e-3), name="no")


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("trainer: {kind: fast, rat: 1}", [], ["trainer.rat: unknown key (got 1)", "did you mean 'rate'?"]),
        ("trainer: {kind: fast, rate: quick}", [], ["trainer.rate:", "number", "'quick'"]),
        ("trainer: {kind: fats}", [], ["trainer.kind: got 'fats'", "'fast'"]),
        ("trainer: {rate: 2}", [], ["trainer.kind: required"]),
        ("trainer: {kind: slow, steps: [1, x]}", [], ["trainer.steps.1:", "'x'"]),
        ("resources: {workers: true}", [], ["resources.workers:", "True"]),
        ("resources: {wrokers: 2}", [], ["resources.wrokers", "'workers'"]),
        ("nmae: y", [], ["nmae: unknown key", "'name'"]),
        ("name: ''", [], ["name must not be empty"]),
        ("name: a\nname: b", [], ["not YAML", "duplicate key"]),
        ("[1]", [], ["expected a mapping"]),
        ("name: a", ["name"], ["override 'name': expected a.b=c"]),
        ("name: a", ["name.deeper=1"], ["name is 'a', not a section"]),
    ],
)
def test_an_error_names_file_path_value_and_nearest_key(
    tmp_path: Path, text: str, overrides: list[str], expected: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        load(Root, write(tmp_path, text), overrides)
    assert "\n" not in str(caught.value)
    for part in expected:
        assert part in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.yaml: no such file"):
        load(Root, tmp_path / "nothing.yaml")


def test_dump_is_read_back_and_replace_checks() -> None:
    config = Root(trainer=Slow(steps=(1, 2)))
    assert from_data(Root, dump(config)) == config
    assert replace(config, {"trainer.steps": [3]}).trainer == Slow(steps=(3,))
    with pytest.raises(UserError, match="stesp"):
        replace(config, {"trainer.stesp": [3]})


def test_fingerprint_changes_with_everything_but_resources() -> None:
    config = Root()
    assert fingerprint(dump(config)) == fingerprint(dump(Root(resources=Resources(workers=9))))
    assert fingerprint(dump(config)) != fingerprint(dump(Root(trainer=Fast(rate=2.0))))


def test_schema_carries_field_docstrings() -> None:
    assert json_schema(Root)["$defs"]["Fast"]["properties"]["rate"]["description"] == "Steps per second."
