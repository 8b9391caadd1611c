"""A student has to take images if and only if the task shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mint_ray.config.loader import UserError
from mint_ray.students.checks import check_images
from mint_ray.students.config import Student
from tests.tiny import save_tiny_student
from tests.vision_students import save_tiny_vlm


def test_a_text_student_is_rejected_if_the_task_shows_images(tmp_path: Path) -> None:
    student = Student(model_id=str(save_tiny_student(tmp_path)))
    check_images(student, show_image=False)
    with pytest.raises(UserError, match="takes no images, but the task shows them"):
        check_images(student, show_image=True)


def test_a_vision_language_student_is_rejected_if_the_task_shows_no_images(tmp_path: Path) -> None:
    student = Student(model_id=str(save_tiny_vlm(tmp_path)))
    check_images(student, show_image=True)
    with pytest.raises(UserError, match="is a vision-language model, but the task shows no images"):
        check_images(student, show_image=False)
