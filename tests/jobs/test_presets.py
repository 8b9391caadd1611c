"""Presets fit on their GPUs, leave the spec's method alone, and have the memory that the README's table states."""

from __future__ import annotations

import dataclasses
import re
from functools import cache
from pathlib import Path

import pytest

from mint_ray.config.loader import dump, fingerprint, load
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.trainers.memory import MemoryEstimate, estimate_memory
from mint_ray.trainers.meta_model import shape_from_meta_model
from tests.llamas import LLAMAS

JOBS = Path(__file__).parents[2] / "jobs"
README = JOBS / "presets" / "README.md"
FREE = 0.1
"""Share of the GPU's memory that stays free for what is not estimated."""
LONG = ["train.trainer.max_length=1952", "train.trainer.train_batch_size=256", "evaluate.generation.max_new_tokens=96"]
RECORD_TOKENS = 2048
"""Tokens of prompt and completions of the table's records."""
ROW = re.compile(r"\| \[(\w+)\]\(\1\.yaml\) \| (?:`(.*?)`)? ?\| (\d) x (\d+) GB \|")


@dataclasses.dataclass(frozen=True)
class Setup:
    """A row of the README's table: a preset with overrides, and GPUs."""

    preset: str
    overrides: tuple[str, ...]
    gpus: int
    gigabytes: int

    def load(self) -> PipelineConfig:
        overrides = [f"train.{override}" for override in self.overrides]
        return load(
            PipelineConfig, JOBS / "rare_disease.yaml", LONG + overrides, [JOBS / "presets" / f"{self.preset}.yaml"]
        )

    def row(self) -> str:
        memory = estimate(self)
        numbers = [memory.weights, memory.gradients, memory.optimizer, memory.activations]
        numbers += [memory.logits + memory.buffers, memory.total, memory.host]
        cells = [
            f"[{self.preset}]({self.preset}.yaml)",
            f"`{' '.join(self.overrides)}`" if self.overrides else "",
            f"{self.gpus} x {self.gigabytes} GB",
            *(f"{number / 1e9:.1f}" for number in numbers),
        ]
        return f"| {' | '.join(cells)} |"


def read_setups() -> list[Setup]:
    found = [ROW.match(line) for line in README.read_text().splitlines() if line.startswith("| [")]
    return [Setup(row[1], tuple((row[2] or "").split()), int(row[3]), int(row[4])) for row in found if row is not None]


SETUPS = read_setups()


@cache
def estimate(setup: Setup) -> MemoryEstimate:
    train = setup.load().train
    shape = shape_from_meta_model(LLAMAS[setup.preset], train.student)
    return estimate_memory(shape, train.student, train.trainer, train.resources, record_tokens=RECORD_TOKENS)


def test_every_preset_is_in_the_table() -> None:
    assert (
        {setup.preset for setup in SETUPS} == {path.stem for path in (JOBS / "presets").glob("*.yaml")} == set(LLAMAS)
    )


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_a_setup_fits_on_its_gpus(setup: Setup) -> None:
    assert estimate(setup).total <= (1 - FREE) * setup.gigabytes * 10**9


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_a_setup_leaves_the_method_alone(setup: Setup) -> None:
    spec, merged = load(PipelineConfig, JOBS / "rare_disease.yaml", LONG), setup.load()
    train = merged.train
    assert (train.resources.num_workers, train.resources.gpus_per_worker) == (setup.gpus, 1)
    # weights in bfloat16 need float32 copies for AdamW, which ZeRO keeps
    assert train.student.lora_rank is not None or (train.trainer.bf16 and train.resources.zero_stage)
    assert train.trainer.objective == spec.train.trainer.objective
    for section in ("task", "prepare", "fit", "score", "pair"):
        assert fingerprint(dump(getattr(merged, section))) == fingerprint(dump(getattr(spec, section)))


def test_the_table_has_the_estimates() -> None:
    rows = [line for line in README.read_text().splitlines() if line.startswith("| [")]
    expected = [setup.row() for setup in SETUPS]
    assert rows == expected, "\n".join(["the table should be", *expected])
