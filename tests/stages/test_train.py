"""Ray Train around the trainer: the number of workers and DeepSpeed do not change what is learned."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mint_ray.artifacts import Artifact
from mint_ray.config.stages import Train
from mint_ray.stages.tokenize import tokenize_pairs
from mint_ray.stages.train import train_student
from mint_ray.students.config import Student
from mint_ray.trainers.config import TrainerArguments, TrainResources
from tests.stages.inputs import interrupt_before_publishing, make_pair, write_pairs
from tests.tiny import save_tiny_student

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

PAIRS = [
    make_pair(number, f"a note of patient {number}", f"1. 'right {number % 3}'", f"1. 'wrong {number % 4} and longer'")
    for number in range(15)
]
Weights = dict[str, torch.Tensor]


def train(root: Path, pairs: Artifact, student: Path, num_workers: int = 1, zero_stage: int | None = None) -> Weights:
    """Train four steps; return the adapter's weights."""
    config = Train(
        student=Student(model_id=str(student), lora_rank=2),
        trainer=TrainerArguments(train_batch_size=4, max_steps=4, eval_steps=2),
        resources=TrainResources(
            num_workers=num_workers, cpus_per_worker=1, per_device_train_batch_size=2, max_failures=0,
            zero_stage=zero_stage,  # type: ignore[arg-type]
        ),
    )  # fmt: skip
    trained = train_student(str(root), config, tokenize_pairs(str(root), config, pairs))
    return load_file(Path(trained.uri) / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Path, Weights]:
    """Return the pairs, the student, and the weights that one worker learns."""
    root = tmp_path_factory.mktemp("alone")
    student = save_tiny_student(root / "student")
    pairs = write_pairs(root, PAIRS[:12], PAIRS[12:])
    return pairs, student, train(root, pairs, student)


@pytest.mark.parametrize(
    ("num_workers", "zero_stage"),
    [
        pytest.param(2, None, id="ddp"),
        pytest.param(2, 2, id="zero-2", marks=pytest.mark.slow),
        pytest.param(2, 3, id="zero-3", marks=pytest.mark.slow),
    ],
)
def test_two_workers_learn_the_same_as_one(
    alone: tuple[Artifact, Path, Weights], tmp_path: Path, num_workers: int, zero_stage: int | None
) -> None:
    pairs, student, expected = alone
    # a relative folder means the same for the workers as here
    weights = train(tmp_path, pairs, Path(os.path.relpath(student)), num_workers, zero_stage)
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=2e-5)
    assert any(weight.abs().max() > 1e-4 for name, weight in expected.items() if "lora_B" in name)


def test_a_finished_training_that_was_not_published_is_not_repeated(
    alone: tuple[Artifact, Path, Weights], tmp_path: Path
) -> None:
    pairs, student, expected = alone
    with interrupt_before_publishing("train"):
        train(tmp_path, pairs, student)
    [run] = (tmp_path / "runs").iterdir()
    assert (run / "finished" / "adapter").is_dir()
    # a second training would fail without them
    for part in tmp_path.glob("tokenize-*/train/*.parquet"):
        part.unlink()
    weights = train(tmp_path, pairs, student)
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight)
    assert list((tmp_path / "runs").iterdir()) == []


def test_each_validation_is_reported_once_and_again_for_a_complete_training(tmp_path: Path) -> None:
    student = Student(model_id=str(save_tiny_student(tmp_path / "student")), lora_rank=2)
    config = Train(
        student=student,
        trainer=TrainerArguments(train_batch_size=4, max_steps=4, eval_steps=2),
        resources=TrainResources(cpus_per_worker=1, per_device_train_batch_size=4, max_failures=0),
    )
    tokens = tokenize_pairs(str(tmp_path), config, write_pairs(tmp_path, PAIRS[:12], PAIRS[12:]))
    for _ in range(2):
        reported: list[tuple[str, int, float]] = []

        def on_evaluation(name: str, step: int, metrics: dict[str, float], to: list = reported) -> None:  # type: ignore[type-arg]
            to.append((name, step, metrics["eval_loss"]))

        trained = train_student(str(tmp_path), config, tokens, on_evaluation=on_evaluation)
        assert [(name, step) for name, step, _ in reported] == [(trained.name, 2), (trained.name, 4)]
        assert all(loss > 0 for _, _, loss in reported)
