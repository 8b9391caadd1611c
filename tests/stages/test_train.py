"""Ray Train around the trainer: workers and DeepSpeed change nothing that is learned."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mint_ray.artifacts import Artifact, open_artifact
from mint_ray.config.stages import Train
from mint_ray.records import Message, PreferencePair
from mint_ray.stages.tokenize import tokenize_pairs
from mint_ray.stages.train import train_student
from mint_ray.students.config import Student
from mint_ray.trainers.config import Arguments, TrainResources
from tests.tiny import save_tiny_student

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def make_pairs(root: Path) -> Artifact:
    def pair(number: int) -> PreferencePair:
        def says(text: str) -> list[Message]:
            return [Message(role="assistant", content=text)]

        return PreferencePair(
            prompt=[Message(role="user", content=f"a note of patient {number}")],
            chosen=says(f"1. 'right {number % 3}'"), rejected=says(f"1. 'wrong {number % 4} at all'"),
            record_id=f"r{number}", split="train", teacher="t", sampler="hard", chosen_labels=["a"], rejected_labels=["b"],
        )  # fmt: skip

    artifact = open_artifact(str(root), "pair", {}, {})
    with artifact.write() as draft:
        draft.write_rows(PreferencePair, "train", [pair(number) for number in range(12)])
        draft.write_rows(PreferencePair, "validation", [pair(number) for number in range(12, 15)])
    return artifact


def weights(
    root: Path, pairs: Artifact, student: Path, workers: int, zero_stage: int | None
) -> dict[str, torch.Tensor]:
    config = Train(
        student=Student(model_id=str(student), lora_rank=2),
        trainer=Arguments(train_batch_size=4, max_steps=4, eval_steps=2),
        resources=TrainResources(
            num_workers=workers, cpus_per_worker=1, per_device_train_batch_size=2, max_failures=0,
            zero_stage=zero_stage,  # type: ignore[arg-type]
        ),
    )  # fmt: skip
    trained = train_student(str(root), config, tokenize_pairs(str(root), config, pairs))
    return load_file(Path(trained.uri) / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Path, dict[str, torch.Tensor]]:
    root = tmp_path_factory.mktemp("alone")
    save_tiny_student(root / "student")
    pairs = make_pairs(root)
    return pairs, root / "student", weights(root, pairs, root / "student", 1, None)


@pytest.mark.parametrize(
    ("workers", "zero_stage"),
    [
        pytest.param(2, None, id="ddp"),
        pytest.param(2, 2, id="zero-2", marks=pytest.mark.slow),
        pytest.param(2, 3, id="zero-3", marks=pytest.mark.slow),
    ],
)
def test_two_workers_learn_what_one_does(
    alone: tuple[Artifact, Path, dict[str, torch.Tensor]], tmp_path: Path, workers: int, zero_stage: int | None
) -> None:
    pairs, student, expected = alone
    # a relative folder is one from where the run was started, for its workers too
    found = weights(tmp_path, pairs, Path(os.path.relpath(student)), workers, zero_stage)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=2e-5)
    assert any(weight.abs().max() > 1e-4 for name, weight in expected.items() if "lora_B" in name)


def test_a_run_that_died_before_it_was_published_is_not_trained_again(
    alone: tuple[Artifact, Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, student, expected = alone

    publish = Artifact._publish

    def die(artifact: Artifact, *arguments: object) -> None:
        if artifact.stage == "train":
            raise KeyboardInterrupt
        publish(artifact, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Artifact, "_publish", die)
        weights(tmp_path, pairs, student, 1, None)
    [run] = (tmp_path / "runs").iterdir()
    assert (run / "finished" / "adapter").is_dir()
    # nobody could train on this
    for part in tmp_path.glob("tokenize-*/train/*.parquet"):
        part.unlink()
    found = weights(tmp_path, pairs, student, 1, None)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight)
    assert list((tmp_path / "runs").iterdir()) == []
