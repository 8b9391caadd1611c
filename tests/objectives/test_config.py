"""Settings are validated with the name of the key, and old keys name the new ones."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mint_ray.config.loader import UserError, from_data
from mint_ray.objectives import build_objective
from mint_ray.objectives.config import AnyObjective, Cpo, Dpo, Ipo, Orpo, Sft, SimPo


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("orpo", "beta", -0.1),
        ("dpo", "beta", 0.0),
        ("ipo", "beta", -1.0),
        ("simpo", "beta", 0.0),
        ("simpo", "simpo_gamma", -1.0),
        ("cpo", "beta", math.nan),
        ("cpo", "cpo_alpha", math.inf),
        ("sft", "nll_on", "prompt"),
    ],
)
def test_an_invalid_value_raises_an_error_with_its_name(kind: str, key: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"{key}.*{value}"):
        from_data(AnyObjective, {"kind": kind, key: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cls", "old", "new"), [(SimPo, "gamma", "simpo_gamma"), (Cpo, "nll_weight", "cpo_alpha")], ids=["simpo", "cpo"]
)
def test_an_old_key_names_the_new_one(cls: type[Any], old: str, new: str) -> None:
    with pytest.raises(UserError, match=f"{old}: unknown key .* did you mean '{new}'"):
        from_data(cls, {old: 1.0})


@pytest.mark.parametrize("config", [Orpo(), Sft(), Dpo(), Ipo(), SimPo(), Cpo()], ids=lambda config: config.kind)
def test_the_config_says_whether_the_objective_uses_a_reference(config: AnyObjective) -> None:
    assert config.uses_reference == build_objective(config).uses_reference
