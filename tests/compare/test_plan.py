"""Methods of a comparison as pipeline configs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mint_ray.compare.plan import plan_methods
from mint_ray.config.comparison import ComparisonConfig
from mint_ray.config.loader import UserError, load
from mint_ray.config.stages import Pair
from mint_ray.records import Method
from tests.compare.runs import config


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        ({"prepare.splits.seed": 1}, "prepare.splits.seed"),
        ({"train.student.lora_rank": 64}, "train.student.lora_rank"),
        ({"train.trainer.learning_rate": 1e-3}, "train.trainer.learning_rate"),
        ({"train.trainer.num_train_epochs": 2.0}, "train.trainer.num_train_epochs"),
        ({"task.hide_gene": False}, "task.hide_gene"),
        ({"evaluate.generation.max_new_tokens": 500}, "evaluate.generation.max_new_tokens"),
        ({"pair.sampler": {"kind": "truth", "top": 4}}, "pair.sampler.top"),
        ({"pair.sampler.pairs_per_record": 3}, "pair.sampler.pairs_per_record"),
    ],
)
def test_a_method_that_differs_in_a_shared_setting_is_an_error_unless_it_allows_it(
    overrides: dict[str, Any], path: str
) -> None:
    message = rf"^methods\.m: {re.escape(path)}: must be equal for all methods; `allow_differences: true` permits"
    with pytest.raises(UserError, match=message):
        plan_methods(config({"m": overrides}))
    [method] = plan_methods(config({"m": {**overrides, "allow_differences": True}}))
    assert method.differences == [path]


def test_resources_and_compared_settings_may_differ() -> None:
    overrides = {
        "train.trainer.objective": {"kind": "dpo"}, "pair.control": "swapped",
        "pair.sampler": {"kind": "sibling", "top": 3}, "train.resources.per_device_train_batch_size": 1,
    }  # fmt: skip
    [method] = plan_methods(config({"m": overrides}))
    assert method.differences == []
    assert method.role == "control"


def test_seeds_change_training_and_random_samplers_but_not_the_split() -> None:
    methods = {"fixed": {"pair.sampler": {"kind": "hard"}}, "drawn": {"pair.sampler": {"kind": "truth"}}}
    fixed, drawn = plan_methods(config(methods, seeds=[3, 5]))
    assert [each.train.trainer.seed for each in fixed.configs] == [3, 5]
    assert [each.pair.sampler.seed for each in fixed.configs] == [0, 0], "equal pairs are drawn once"
    assert [each.pair.sampler.seed for each in drawn.configs] == [3, 5]
    assert {each.prepare.splits.seed for each in (*fixed.configs, *drawn.configs)} == {0}


def test_a_base_student_is_not_trained_so_it_runs_once() -> None:
    [method] = plan_methods(config({"m": {"student": "base"}}, seeds=[0, 1, 2]))
    assert len(method.configs) == 1
    assert method.student == "base"


def test_answers_are_those_of_the_student_in_every_mode_and_with_retrieval_those_with_passages() -> None:
    generation = {"evaluate": {"generation": {"modes": ["free", "rank"]}}}
    plain, rag = plan_methods(
        config({"plain": {}, "rag": {"student": "base", "evaluate.retrieval": {"max_passages": 2}}}, **generation)
    )
    assert plain.methods == [Method(student="aligned"), Method(student="aligned", mode="rank")]
    assert rag.methods == [
        Method(student="base", retrieval=True),
        Method(student="base", retrieval=True, mode="rank"),
    ]


@pytest.mark.parametrize("name", ["teacher", "base student", "base student, ranked", "m, run 1 of 2"])
def test_any_name_can_be_the_name_of_a_method(name: str) -> None:
    assert [method.name for method in plan_methods(config({name: {}}))] == [name]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train.trainer.objective.bta": 1}, r"^methods\.m: .*train\.trainer\.objective\.bta: unknown key"),
        ({"student": "both"}, r"^methods\.m\.student: expected base or aligned, got 'both'$"),
        ({"allow_differences": "yes"}, r"^methods\.m\.allow_differences: expected true or false, got 'yes'$"),
        ({"unequal": True}, r"^methods\.m\.unequal: unknown key \(got True\); did you mean 'allow_differences'\?$"),
    ],
)
def test_an_invalid_method_is_named_in_the_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_methods(config({"m": settings}))


def test_the_shipped_comparison_is_on_equal_terms_and_has_its_controls() -> None:
    shipped = load(ComparisonConfig, Path(__file__).parents[2] / "jobs" / "compare.yaml")
    methods = {method.name: method for method in plan_methods(shipped)}
    differences = {name: method.differences for name, method in methods.items() if method.differences}
    assert differences == {"sft on the truth, one name": ["pair.sampler.top"]}
    assert {name for name, method in methods.items() if len(method.configs) != 3} == {"rag"}
    assert {method.configs[0].pair.control for method in methods.values()} == {None, "swapped", "relabelled"}
    assert methods["orpo"].configs[0].pair == Pair(sampler=shipped.pair.sampler)
