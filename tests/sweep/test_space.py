from __future__ import annotations

from pathlib import Path

import pytest

from mint_ray.config.loader import UserError, from_data, load, replace
from mint_ray.config.sweep import Choice, Float, Int, SweepConfig
from mint_ray.sweep.space import check_space, draw, grid, names_of

BASE = {
    "task": {"kind": "rare_disease"},
    "prepare": {"source": {"kind": "hpo"}},
    "train": {"student": {"model_id": "bundled:smollm2-135m-instruct"}},
}
SAMPLER = Choice(
    of=(
        {"kind": "hard", "top": 2},
        {"kind": "margin", "margin": {"kind": "float", "low": 0.1, "high": 0.3, "points": 2}},
    )
)


def config(**space: object) -> SweepConfig:
    return from_data(SweepConfig, {**BASE, "sweep": {"space": space}})


def refusal(path: str, varied: object) -> str:
    with pytest.raises(UserError) as refused:
        found = config(**{path: varied})
        check_space(found.pipeline, found.sweep.space)
    return str(refused.value)


def test_a_member_brings_its_own_parameters_and_only_where_it_was_chosen() -> None:
    asked: list[str] = []

    def suggest(name: str, varied: object) -> object:
        asked.append(name)
        return {"pair.sampler": "margin", "train.student.lora_rank": 8}.get(name, 0.2)

    space = {"pair.sampler": SAMPLER, "train.student.lora_rank": Int(low=4, high=16)}
    assert draw(space, suggest) == {
        "pair.sampler": {"kind": "margin", "margin": 0.2},
        "train.student.lora_rank": 8,
    }
    assert asked == ["pair.sampler", "pair.sampler[margin].margin", "train.student.lora_rank"]


def test_what_is_drawn_is_a_spec() -> None:
    made = config(**{"pair.sampler": {"kind": "choice", "of": list(SAMPLER.of)}})
    check_space(made.pipeline, made.sweep.space)
    changes = draw(made.sweep.space, lambda name, varied: "margin" if name == "pair.sampler" else 0.25)
    sampler = replace(made.pipeline, changes).pair.sampler
    assert (sampler.kind, sampler.margin) == ("margin", 0.25)  # type: ignore[union-attr]


def test_a_grid_holds_every_combination_once_also_where_members_have_parameters_of_their_own() -> None:
    space = {
        "pair.sampler": SAMPLER,
        "b": Float(low=0.01, high=1.0, log=True, points=3),
        "r": Int(low=4, high=8, step=4),
    }
    rows = list(grid(space))
    # hard alone, margin with each of its two, times three, times two
    assert len(rows) == (1 + 2) * 3 * 2
    assert len({tuple(sorted(row.items())) for row in rows}) == len(rows)
    assert sorted({row["b"] for row in rows}) == pytest.approx([0.01, 0.1, 1.0])
    assert {row.get("pair.sampler[margin].margin") for row in rows} == {None, 0.1, 0.1 + (0.3 - 0.1)}
    assert [row["r"] for row in rows[:3]] == [4, 8, 4]


def test_members_are_called_by_their_kind_or_value() -> None:
    assert names_of(Choice(of=(1, "a", None, True))) == [1, "a", None, True]
    assert names_of(SAMPLER) == ["hard", "margin"]
    twice = names_of(Choice(of=({"kind": "hard", "top": 2}, {"kind": "hard", "top": 3}, [1, 2])))
    assert twice == ['{"kind": "hard", "top": 2}', '{"kind": "hard", "top": 3}', "[1, 2]"]


@pytest.mark.parametrize(
    ("path", "varied", "said"),
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
            "config: sweep.space.train.trainer.learning_rate: low must be positive where log is true, got 0",
        ),
        (
            "train.student.lora_rank",
            {"kind": "float", "low": 1.5, "high": 8},
            "sweep.space.train.student.lora_rank: ",
        ),
        (
            "train.trainer.lr_scheduler_type",
            {"kind": "choice", "of": ["cosine", "square"]},
            "sweep.space.train.trainer.lr_scheduler_type: ",
        ),
        (
            "pair.sampler",
            {"kind": "choice", "of": [{"kind": "margin", "margin": {"kind": "float", "low": 0.5, "high": 1.5}}]},
            "sweep.space.pair.sampler: margin must lie in 0 to 1, got 1.5",
        ),
        (
            "prepare.splits.seed",
            {"kind": "int", "low": 0, "high": 3},
            "sweep.space.prepare.splits.seed: prepare decides",
        ),
        ("train.resources.num_workers", {"kind": "int", "low": 1, "high": 2}, "resources change no result"),
    ],
)
def test_what_is_wrong_with_a_space_is_said_in_one_line(path: str, varied: object, said: str) -> None:
    line = refusal(path, varied)
    assert said in line
    assert "\n" not in line


def test_a_path_inside_another_is_refused() -> None:
    found = config(
        **{
            "pair.sampler": {"kind": "choice", "of": [{"kind": "hard"}]},
            "pair.sampler.top": {"kind": "int", "low": 1, "high": 3},
        }
    )
    with pytest.raises(UserError, match=r"sweep\.space\.pair\.sampler\.top: lies in pair\.sampler"):
        check_space(found.pipeline, found.sweep.space)


def test_a_grid_over_a_range_without_points_is_refused() -> None:
    with pytest.raises(UserError, match=r"sweep\.space\.b: a grid needs points"):
        list(grid({"b": Float(low=0.1, high=1.0)}))


def test_the_sweep_that_is_shipped_can_be_drawn_from() -> None:
    shipped = load(SweepConfig, Path(__file__).parents[2] / "jobs" / "rare_disease.sweep.yaml")
    check_space(shipped.pipeline, shipped.sweep.space)
    samplers = names_of(shipped.sweep.space["pair.sampler"])  # type: ignore[arg-type]
    assert len(samplers) >= 4
    assert shipped.sweep.trials >= 16
