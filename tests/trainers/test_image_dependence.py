"""A student that depends on its images is distinguished from one that ignores them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mint_ray.config.loader import UserError
from mint_ray.records import Message, PreferencePair
from mint_ray.students import Student
from mint_ray.trainers.image_dependence import measure_image_effects
from tests.vision_students import save_image, save_tiny_vlm


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def pairs(folder: Path) -> list[PreferencePair]:
    (folder / "0.png").write_bytes(b"not an image")
    uris = [str(folder / "0.png"), save_image(folder / "1.png", 1), save_image(folder / "2.png", 2, 64, 64)]
    return [
        PreferencePair(
            prompt=[Message(role="user", content="Which tissue?")],
            chosen=[Message(role="assistant", content="liver")], rejected=[Message(role="assistant", content="skin")],
            record_id=f"r{number}", split="train", teacher="", sampler="", chosen_labels=[], rejected_labels=[],
            image_uri=uri,
        )
        for number, uri in enumerate(uris)
    ]  # fmt: skip


@pytest.mark.parametrize("family", ["llava", "idefics3", "gemma3", "mllama"])
def test_another_image_and_a_gray_one_change_log_probabilities_and_gradients(family: str, tmp_path: Path) -> None:
    student = Student(model_id=str(save_tiny_vlm(tmp_path / "student", family)), lora_rank=2)
    other, gray = measure_image_effects(student, pairs(tmp_path), 400)
    assert (other.image, gray.image) == ("that of record 'r2'", "plain gray")
    for effect in (other, gray):
        assert effect.is_visible
        assert effect.max_logp_change > 1e-3
        assert effect.gradient_change > 1e-3


def test_a_student_that_ignores_its_images_is_detected(tmp_path: Path) -> None:
    folder = save_tiny_vlm(tmp_path / "student", "mllama")
    weights = load_file(folder / "model.safetensors")
    # the gates of an untrained cross-attention
    closed = {name: weight * 0 if "cross_attn_" in name else weight for name, weight in weights.items()}
    save_file(closed, folder / "model.safetensors", metadata={"format": "pt"})
    effects = measure_image_effects(
        Student(model_id=str(folder), lora_rank=2, modules_to_save=()), pairs(tmp_path), 400
    )
    assert [effect.is_visible for effect in effects] == [False, False]


def test_fewer_than_two_readable_images_raise_an_error(tmp_path: Path) -> None:
    student = Student(model_id=str(save_tiny_vlm(tmp_path / "student")), lora_rank=2)
    with pytest.raises(UserError, match="no two records have readable images"):
        measure_image_effects(student, pairs(tmp_path)[:2], 400)
