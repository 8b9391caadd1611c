"""Whom we teach: weights, tokenizer, adapter, and batched generation; importing this loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mint_ray.students.config import Generation, Mode, Student
from mint_ray.students.constrained_decoding import Answers
from mint_ray.students.weights import check_sight, check_student, resolve_path, student_place, student_revision

if TYPE_CHECKING:
    from mint_ray.students.student import (
        StudentGenerator,
        load_model,
        load_processor,
        load_sight,
        load_tokenizer,
        save_adapter,
    )

__all__ = [
    "Answers",
    "Generation",
    "Mode",
    "Student",
    "StudentGenerator",
    "check_sight",
    "check_student",
    "load_model",
    "load_processor",
    "load_sight",
    "load_tokenizer",
    "resolve_path",
    "save_adapter",
    "student_place",
    "student_revision",
]


def __getattr__(name: str) -> Any:
    # what needs torch is imported when it is first asked for, so that a config and its checks stay light
    if name in __all__:
        from mint_ray.students import student

        return getattr(student, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
