"""A student that looks is told from one that does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mint_ray.config.loader import UserError
from mint_ray.records import Message, PreferencePair
from mint_ray.students import Student
from mint_ray.trainers.pixels import find_changes
from tests.vision_students import save_image, save_tiny_seeing


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def pairs(place: Path) -> list[PreferencePair]:
    (place / "0.png").write_bytes(b"not an image")
    uris = [str(place / "0.png"), save_image(place / "1.png", 1), save_image(place / "2.png", 2, 64, 64)]
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
def test_another_image_and_none_to_speak_of_change_log_probabilities_and_gradients(family: str, tmp_path: Path) -> None:
    student = Student(model_id=str(save_tiny_seeing(tmp_path / "student", family)), lora_rank=2)
    other, grey = find_changes(student, pairs(tmp_path), 400)
    assert (other.image, grey.image) == ("that of record 'r2'", "plain grey")
    for change in (other, grey):
        assert change.is_seen
        assert change.logps > 1e-3
        assert change.gradients > 1e-3


def test_a_student_that_looks_away_is_found_out(tmp_path: Path) -> None:
    folder = save_tiny_seeing(tmp_path / "student", "mllama")
    weights = load_file(folder / "model.safetensors")
    # the gates of a cross-attention that was never trained
    closed = {name: weight * 0 if "cross_attn_" in name else weight for name, weight in weights.items()}
    save_file(closed, folder / "model.safetensors", metadata={"format": "pt"})
    changes = find_changes(Student(model_id=str(folder), lora_rank=2, whole_parts=()), pairs(tmp_path), 400)
    assert [change.is_seen for change in changes] == [False, False]


def test_less_than_two_images_are_too_few(tmp_path: Path) -> None:
    student = Student(model_id=str(save_tiny_seeing(tmp_path / "student")), lora_rank=2)
    with pytest.raises(UserError, match="no two records have images"):
        find_changes(student, pairs(tmp_path)[:2], 400)
