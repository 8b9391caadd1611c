"""Search spaces: samples, grids and errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from mint_ray.config.loader import UserError, from_data, load, replace
from mint_ray.config.sweep import Choice, Float, Int, SweepConfig
from mint_ray.sweep.space import check_space, draw, grid, member_names

BASE = {
    "task": {"kind": "rare_disease"},
    "prepare": {"source": {"kind": "hpo"}},
    "train": {"student": {"model_id": "bundled:smollm2-135m-instruct"}},
}
SAMPLER = Choice(
    choices=(
        {"kind": "hard", "top": 2},
        {"kind": "margin", "margin": {"kind": "float", "low": 0.1, "high": 0.3, "num_points": 2}},
    )
)


def config(**space: object) -> SweepConfig:
    return from_data(SweepConfig, {**BASE, "sweep": {"space": space}})


def error_of(path: str, varied: object) -> str:
    with pytest.raises(UserError) as raised:
        found = config(**{path: varied})
        check_space(found.pipeline, found.sweep.space)
    return str(raised.value)


def test_parameters_of_a_member_are_sampled_only_if_it_is_chosen() -> None:
    sampled: list[str] = []

    def suggest(name: str, varied: object) -> object:
        sampled.append(name)
        return {"pair.sampler": "margin", "train.student.lora_rank": 8}.get(name, 0.2)

    space = {"pair.sampler": SAMPLER, "train.student.lora_rank": Int(low=4, high=16)}
    assert draw(space, suggest) == {
        "pair.sampler": {"kind": "margin", "margin": 0.2},
        "train.student.lora_rank": 8,
    }
    assert sampled == ["pair.sampler", "pair.sampler[margin].margin", "train.student.lora_rank"]


def test_a_sample_is_a_valid_spec() -> None:
    made = config(**{"pair.sampler": {"kind": "choice", "choices": list(SAMPLER.choices)}})
    check_space(made.pipeline, made.sweep.space)
    changes = draw(made.sweep.space, lambda name, varied: "margin" if name == "pair.sampler" else 0.25)
    sampler = replace(made.pipeline, changes).pair.sampler
    assert (sampler.kind, sampler.margin) == ("margin", 0.25)  # type: ignore[union-attr]


def test_a_grid_contains_every_combination_once_including_conditional_parameters() -> None:
    space = {
        "pair.sampler": SAMPLER,
        "b": Float(low=0.01, high=1.0, log=True, num_points=3),
        "r": Int(low=4, high=8, step=4),
    }
    rows = list(grid(space))
    # hard, and margin with each of two values; times three; times two
    assert len(rows) == (1 + 2) * 3 * 2
    assert len({tuple(sorted(row.items())) for row in rows}) == len(rows)
    assert sorted({row["b"] for row in rows}) == pytest.approx([0.01, 0.1, 1.0])
    assert {row.get("pair.sampler[margin].margin") for row in rows} == {None, 0.1, 0.1 + (0.3 - 0.1)}
    assert [row["r"] for row in rows[:3]] == [4, 8, 4]


def test_members_are_named_by_their_kind_or_value() -> None:
    assert member_names(Choice(choices=(1, "a", None, True))) == [1, "a", None, True]
    assert member_names(SAMPLER) == ["hard", "margin"]
    repeated = member_names(Choice(choices=({"kind": "hard", "top": 2}, {"kind": "hard", "top": 3}, [1, 2])))
    assert repeated == ['{"kind": "hard", "top": 2}', '{"kind": "hard", "top": 3}', "[1, 2]"]


@pytest.mark.parametrize(
    ("path", "parameter", "message"),
    [
        (
            "train.trainer.learning_rat",
            {"kind": "float", "low": 1e-4, "high": 1e-3},
            "sweep.space.train.trainer.learning_rat: unknown key (got 0.0001); did you mean 'learning_rate'?",
        ),
        (
            "train.trainer.learning_rate",
            {"kind": "float", "low": 1e-3, "high": 1e-4},
            "config: sweep.space.train.trainer.learning_rate: low must be below high, got 0.001 and 0.0001",
        ),
        (
            "train.trainer.learning_rate",
            {"kind": "float", "low": 0, "high": 1, "log": True},
            "config: sweep.space.train.trainer.learning_rate: low must be positive if log is true, got 0",
        ),
        (
            "train.student.lora_rank",
            {"kind": "float", "low": 1.5, "high": 8},
            "sweep.space.train.student.lora_rank: ",
        ),
        (
            "train.trainer.lr_scheduler_type",
            {"kind": "choice", "choices": ["cosine", "square"]},
            "sweep.space.train.trainer.lr_scheduler_type: ",
        ),
        (
            "pair.sampler",
            {"kind": "choice", "choices": [{"kind": "margin", "margin": {"kind": "float", "low": 0.5, "high": 1.5}}]},
            "sweep.space.pair.sampler: margin must lie in 0 to 1, got 1.5",
        ),
        (
            "prepare.splits.seed",
            {"kind": "int", "low": 0, "high": 3},
            "sweep.space.prepare.splits.seed: cannot be varied: prepare defines",
        ),
        (
            "train.resources.num_workers",
            {"kind": "int", "low": 1, "high": 2},
            "cannot be varied: resources change no result",
        ),
    ],
)
def test_an_invalid_space_gives_a_one_line_error(path: str, parameter: object, message: str) -> None:
    line = error_of(path, parameter)
    assert message in line
    assert "\n" not in line


def test_a_path_inside_another_is_an_error() -> None:
    found = config(
        **{
            "pair.sampler": {"kind": "choice", "choices": [{"kind": "hard"}]},
            "pair.sampler.top": {"kind": "int", "low": 1, "high": 3},
        }
    )
    with pytest.raises(UserError, match=r"sweep\.space\.pair\.sampler\.top: is inside pair\.sampler"):
        check_space(found.pipeline, found.sweep.space)


def test_a_grid_over_a_range_without_a_number_of_points_is_an_error() -> None:
    with pytest.raises(UserError, match=r"sweep\.space\.b: a grid search needs num_points"):
        list(grid({"b": Float(low=0.1, high=1.0)}))


def test_the_shipped_sweep_has_a_valid_space() -> None:
    shipped = load(SweepConfig, Path(__file__).parents[2] / "jobs" / "rare_disease.sweep.yaml")
    check_space(shipped.pipeline, shipped.sweep.space)
    samplers = member_names(shipped.sweep.space["pair.sampler"])  # type: ignore[arg-type]
    assert len(samplers) >= 4
    assert shipped.sweep.n_trials >= 16
