"""Configs from YAML, layers and overrides; their errors; fingerprints."""

from __future__ import annotations

import traceback
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from mint_ray.config.loader import (
    Resources,
    UserError,
    _sections,
    dump,
    fingerprint,
    from_data,
    json_schema,
    load,
    one_line,
    replace,
    resources_of,
    settings,
    without_resources,
)
from mint_ray.config.specs import config_class


@settings
class Fast:
    kind: Literal["fast"] = "fast"
    rate: float = 1.0
    """Steps per second."""


@settings
class Slow:
    kind: Literal["slow"] = "slow"
    steps: tuple[int, ...] = ()
    pause: float = 0.0

    def __post_init__(self) -> None:
        if self.pause > len(self.steps):
            raise ValueError(f"pause must not exceed the steps, got {self.pause} and {len(self.steps)}")


@settings
class Workers(Resources):
    workers: int = 1


@settings
class Root:
    trainer: Annotated[Fast | Slow, Field(discriminator="kind")] = Fast()
    name: str = "x"
    resources: Workers = Workers()

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name must not be empty, got ''")


def write(tmp_path: Path, text: str, name: str = "spec.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_overrides_win_over_the_file_and_scientific_notation_is_a_number(tmp_path: Path) -> None:
    path = write(tmp_path, "trainer: {kind: fast, rate: 5e-4}\n")
    assert load(Root, path).trainer == Fast(rate=5e-4)
    assert load(Root, path, ["trainer.rate=1e-3", "name=no"]) == Root(trainer=Fast(rate=1e-3), name="no")


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("trainer: {kind: fast, rat: 1}", [], ["trainer.rat: unknown key (got 1)", "did you mean 'rate'?"]),
        ("trainer: {kind: fast, rate: quick}", [], ["trainer.rate:", "number", "'quick'"]),
        ("trainer: {kind: fats}", [], ["trainer.kind: got 'fats'", "'fast'"]),
        ("trainer: {steps: [1]}", [], ["trainer.steps: unknown key"]),
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


def test_layers_are_merged_key_by_key_in_order_and_overrides_come_last(tmp_path: Path) -> None:
    spec = write(tmp_path, "name: recipe\ntrainer: {kind: slow, steps: [1, 2, 3], pause: 2.0}\n")
    one = write(tmp_path, "resources: {workers: 2}\ntrainer: {steps: [4, 5]}\n", "one.yaml")
    two = write(tmp_path, "resources: {workers: 4}\n", "two.yaml")
    config = load(Root, spec, layers=[one, two])
    # a list replaces the one below
    assert config == Root(name="recipe", trainer=Slow(steps=(4, 5), pause=2.0), resources=Workers(workers=4))
    assert load(Root, spec, ["resources.workers=8"], [one, two]).resources.workers == 8
    assert load(Root, spec, layers=[two, one]).resources.workers == 2


def test_a_layer_that_changes_the_kind_replaces_the_whole_mapping(tmp_path: Path) -> None:
    spec = write(tmp_path, "trainer: {kind: slow, steps: [1]}\n")
    assert load(Root, spec, layers=[write(tmp_path, "trainer: {kind: fast}", "f.yaml")]).trainer == Fast()
    same = write(tmp_path, "trainer: {kind: slow, pause: 1}", "s.yaml")
    assert load(Root, spec, layers=[same]).trainer == Slow(steps=(1,), pause=1.0)


def test_a_section_without_a_kind_has_the_default_kind(tmp_path: Path) -> None:
    spec = write(tmp_path, "trainer: {rate: 2}\n")
    assert load(Root, spec).trainer == Fast(rate=2.0)
    assert load(Root, write(tmp_path, "name: a", "a.yaml"), ["trainer.rate=3"]).trainer == Fast(rate=3.0)
    # therefore another kind replaces the section, and the same kind is merged
    assert load(Root, spec, layers=[write(tmp_path, "trainer: {kind: slow}", "s.yaml")]).trainer == Slow()
    assert load(Root, spec, layers=[write(tmp_path, "trainer: {kind: fast}", "f.yaml")]).trainer == Fast(rate=2.0)
    later = [write(tmp_path, "trainer: {rate: 2}", "one.yaml"), write(tmp_path, "trainer: {kind: slow}", "two.yaml")]
    assert load(Root, write(tmp_path, "name: a", "a.yaml"), layers=later).trainer == Slow()


@pytest.mark.parametrize(
    ("spec", "layer", "overrides", "expected"),
    [
        ("name: a", "resources: {workers: many}", [], "{layer}: resources.workers:"),
        ("name: a", "resources: {wrokers: 2}", [], "{layer}: resources.wrokers: unknown key"),
        ("resources: {workers: many}", "name: a", [], "{spec}: resources.workers:"),
        ("resources: {workers: many}", "resources: {workers: 2}", ["resources.workers=few"], "override 'resources.workers=few': resources.workers:"),
        ("trainer: {kind: slow}", "trainer: {kind: fats}", [], "{layer}: trainer.kind: got 'fats'"),
        ("trainer: {kind: slow, steps: [1]}", "trainer: {steps: [1, x]}", [], "{layer}: trainer.steps.1:"),
        # an error about several keys names all their sources
        ("trainer: {kind: slow, steps: [1]}", "trainer: {pause: 2}", [], "{spec}, {layer}: trainer: pause must not exceed the steps, got 2.0 and 1"),
        ("trainer: {kind: slow, pause: 2}", "name: b", ["trainer.steps=[1]"], "{spec}, override 'trainer.steps=[1]': trainer: pause must"),
        ("name: a", "name: ''", [], "{layer}: name must not be empty"),
        ("name: a", "[1]", [], "{layer}: expected a mapping"),
    ],
)  # fmt: skip
def test_an_error_names_the_layer_that_the_value_came_from(
    tmp_path: Path, spec: str, layer: str, overrides: list[str], expected: str
) -> None:
    paths = {"spec": write(tmp_path, spec), "layer": write(tmp_path, layer, "layer.yaml")}
    with pytest.raises(UserError) as caught:
        load(Root, paths["spec"], overrides, [paths["layer"]])
    assert str(caught.value).startswith(expected.format(**paths))


def test_a_missing_key_is_reported_for_the_spec(tmp_path: Path) -> None:
    @settings
    class Required:
        name: str
        resources: Workers = Workers()

    spec, layer = write(tmp_path, "{}"), write(tmp_path, "resources: {workers: 2}", "layer.yaml")
    with pytest.raises(UserError, match=r"spec\.yaml: name: required, and not given"):
        load(Required, spec, layers=[layer])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.yaml: no such file"):
        load(Root, tmp_path / "nothing.yaml")
    with pytest.raises(UserError, match=r"nothing\.yaml: no such file"):
        load(Root, write(tmp_path, "name: a"), layers=[tmp_path / "nothing.yaml"])


def test_dump_is_read_back_and_replace_checks() -> None:
    config = Root(trainer=Slow(steps=(1, 2)))
    assert from_data(Root, dump(config)) == config
    assert replace(config, {"trainer.steps": [3]}).trainer == Slow(steps=(3,))
    with pytest.raises(UserError, match="stesp"):
        replace(config, {"trainer.stesp": [3]})


def test_fingerprint_changes_with_everything_but_resources() -> None:
    config = Root()
    assert fingerprint(config) == fingerprint(Root(resources=Workers(workers=9)))
    assert fingerprint({"a": [config]}) == fingerprint({"a": [Root(resources=Workers(workers=9))]})
    assert fingerprint(config) != fingerprint(Root(trainer=Fast(rate=2.0)))


@settings
class Imported:
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the user's own code."""
    nested: Root = Root()


def test_an_option_of_the_user_that_is_named_resources_counts() -> None:
    one, other = (Imported(options={"resources": {"atlas": name}}) for name in ("a", "b"))
    assert fingerprint(one) != fingerprint(other)
    assert without_resources(one) == {
        "options": {"resources": {"atlas": "a"}},
        "nested": {key: value for key, value in dump(Root()).items() if key != "resources"},
    }


def test_resources_are_found_by_their_type_at_any_depth() -> None:
    config = Imported(nested=Root(resources=Workers(workers=3)), options={"resources": 1})
    assert resources_of(config) == {"nested.resources": {"workers": 3}}
    assert resources_of({"fit": config}) == {"fit.nested.resources": {"workers": 3}}


@pytest.mark.parametrize("command", ["run", "compare", "sweep"])
def test_each_section_of_worker_counts_in_a_spec_is_of_the_type_resources(command: str) -> None:
    sections = {section for section in _sections(config_class(command), set()) if "Resources" in section.__name__}
    assert "TrainResources" in {section.__name__ for section in sections}
    assert [section for section in sections if not issubclass(section, Resources)] == []


def test_plain_data_of_a_config_can_be_stripped_of_its_resources() -> None:
    data = dump(Imported(options={"resources": 1})) | {"options": {"resources": 2}}
    assert without_resources(Imported(options={"resources": 1}), data)["options"] == {"resources": 2}
    assert "resources" not in without_resources(Imported(options={"resources": 1}), data)["nested"]


def test_schema_carries_field_docstrings() -> None:
    assert json_schema(Root)["$defs"]["Fast"]["properties"]["rate"]["description"] == "Steps per second."


def test_an_error_on_one_line_keeps_its_whole_message() -> None:
    assert one_line(UserError("pair.sampler: hard\n  drew no pair")) == "pair.sampler: hard drew no pair"
    assert one_line(OSError("no room\n")) == "no room"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line(ValueError("x" * 10_000))) == 500


def test_a_message_with_a_traceback_gives_its_last_line() -> None:
    try:
        raise MemoryError("no room for 3 GB")
    except MemoryError:
        text = traceback.format_exc()
    assert one_line(RuntimeError(f"the worker failed:\n{text}")) == "MemoryError: no room for 3 GB"


def test_the_type_of_an_unexpected_error_can_be_named() -> None:
    assert one_line(MemoryError("no room"), with_type=True) == "MemoryError: no room"
    assert one_line(KeyError(), with_type=True) == "KeyError"
    assert one_line(UserError("sweep.space: empty"), with_type=True) == "sweep.space: empty"


def test_an_error_that_ray_wrapped_is_unwrapped() -> None:
    # Ray raises what a task raised as the cause of a RayTaskError, and Ray Data as the __cause__ of its own error
    ray_data_error = type("UserCodeException", (Exception,), {"__module__": "ray.exceptions"})("UDF failed")
    ray_data_error.__cause__ = MemoryError("no room")
    ray_task_error = RuntimeError("a traceback\nTo change retry attempts, configure this and that")
    ray_task_error.cause = ray_data_error  # type: ignore[attr-defined]
    assert one_line(ray_task_error, with_type=True) == "MemoryError: no room"
    ours = RuntimeError("pair failed")
    ours.__cause__ = MemoryError("no room")
    assert one_line(ours) == "pair failed"
