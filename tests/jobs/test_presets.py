from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from mint_ray.config.loader import dump, fingerprint, load
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.trainers.memory import Memory, estimate, shape_of
from tests.llamas import LLAMAS

JOBS = Path(__file__).parents[2] / "jobs"
PRESETS = sorted((JOBS / "presets").glob("*.yaml"))
ROOM = 0.1
"""Share of the card that stays free for what is not estimated."""
LONG = ["train.trainer.max_length=1952", "train.trainer.train_batch_size=256", "evaluate.generation.max_new_tokens=96"]
RECORD_TOKENS = 2048
"""Prompt and answers of the records that the table is worked out for."""


def load_preset(path: Path) -> PipelineConfig:
    return load(PipelineConfig, JOBS / "rare_disease.yaml", LONG, [path])


@cache
def memory_of(path: Path) -> Memory:
    train = load_preset(path).train
    (name,) = (name for name in LLAMAS if path.name.startswith(name))
    shape = shape_of(LLAMAS[name], train.student)
    return estimate(shape, train.student, train.trainer, train.resources, record_tokens=RECORD_TOKENS)


def card_of(path: Path) -> int:
    """Bytes of the card that a preset is named after."""
    return next(int(part.removesuffix("gb")) for part in path.stem.split("_") if part.endswith("gb")) * 10**9


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_fits_its_card_with_room_to_spare(path: Path) -> None:
    assert memory_of(path).total <= (1 - ROOM) * card_of(path)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_says_where_and_leaves_the_recipe_alone(path: Path) -> None:
    recipe, laid = load(PipelineConfig, JOBS / "rare_disease.yaml", LONG), load_preset(path)
    train = laid.train
    assert (train.student.lora_rank is None) == path.stem.endswith("_full")
    assert train.resources.gpus_per_worker == 1
    # weights of two bytes are not to be stepped on without float32 copies, which ZeRO's engine keeps
    assert train.student.lora_rank is not None or (train.trainer.bf16 and train.resources.zero_stage)
    assert train.trainer.objective == recipe.train.trainer.objective
    for section in ("task", "prepare", "fit", "score", "pair"):
        assert fingerprint(dump(getattr(laid, section))) == fingerprint(dump(getattr(recipe, section)))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_says_that_it_was_never_run_and_on_how_many_cards_it_stands(path: Path) -> None:
    head, workers = path.read_text().splitlines()[0], load_preset(path).train.resources.num_workers
    assert head.startswith("# ")
    assert f"on {workers} card{'s' if workers > 1 else ''} of {card_of(path) // 10**9} GB. Computed, never run" in head


def test_the_table_holds_what_is_estimated() -> None:
    rows = [line for line in (JOBS / "presets" / "README.md").read_text().splitlines() if line.startswith("| [")]
    expected = [row_of(path) for path in PRESETS]
    assert rows == expected, "\n".join(["the table should be", *expected])


def row_of(path: Path) -> str:
    resources, memory = load_preset(path).train.resources, memory_of(path)
    zero = "DDP" if resources.zero_stage is None else f"ZeRO-{resources.zero_stage}"
    offload = "" if resources.offload == "none" else f", {resources.offload} on the CPU"
    numbers = [
        memory.weights,
        memory.gradients,
        memory.optimizer,
        memory.activations,
        memory.head + memory.buffers,
        memory.total,
        memory.host,
    ]
    cells = [
        f"[{path.stem}]({path.name})",
        resources.num_workers,
        f"{zero}{offload}",
        "yes" if resources.gradient_checkpointing else "no",
        resources.per_device_train_batch_size,
        *(f"{number / 1e9:.1f}" for number in numbers),
    ]
    return f"| {' | '.join(str(cell) for cell in cells)} |"
