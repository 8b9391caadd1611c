"""Files of .github/ against the code: renamed config keys, version."""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from mint_ray.config.specs import config_class

ROOT = Path(__file__).parents[1]
CHANGELOG = (ROOT / ".github" / "CHANGELOG.md").read_text()


def settings_classes(annotation: Any) -> Iterator[type]:
    """Yield every settings class in a type annotation, however nested."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from settings_classes(argument)


def reachable(cls: type, found: set[type]) -> set[type]:
    """Return the settings classes of all sections below `cls`."""
    if cls not in found:
        found.add(cls)
        for annotation in typing.get_type_hints(cls, include_extras=True).values():
            for member in settings_classes(annotation):
                reachable(member, found)
    return found


def test_the_changelog_lists_every_renamed_key() -> None:
    classes: set[type] = set()
    for command in ("run", "compare", "sweep"):
        reachable(config_class(command), classes)
    renamed = {pair for cls in classes for pair in getattr(cls, "renamed_keys", {}).items()}
    assert len(renamed) > 20
    assert sorted(f"`{old}` | `{new}` |" for old, new in renamed if f"`{old}` | `{new}` |" not in CHANGELOG) == []


def test_the_citation_has_the_package_s_version_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / ".github" / "CITATION.cff").read_text())
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    [paper] = citation["references"]
    assert paper["url"] == "https://arxiv.org/abs/2505.05736"
