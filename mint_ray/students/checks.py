"""A check that a student fits its task; it loads no weights, and importing it loads no torch."""

from __future__ import annotations

from mint_ray.config.loader import UserError
from mint_ray.models.pretrained import resolve_model, takes_images
from mint_ray.students.config import Student


def check_images(student: Student, *, show_image: bool) -> None:
    """Check that the student takes images if and only if the task shows them; the model must exist (`check_model`).

    Raises:
        UserError: A text student is shown images, or a vision-language student is not.
    """
    is_vlm = takes_images(resolve_model(student, "student"))
    if show_image and not is_vlm:
        raise UserError(
            f"train.student.model_id: {student.model_id} takes no images, but the task shows them; set "
            "task.show_image to false, or choose a vision-language student"
        )
    if is_vlm and not show_image:
        raise UserError(
            f"train.student.model_id: {student.model_id} is a vision-language model, but the task shows no images"
        )
