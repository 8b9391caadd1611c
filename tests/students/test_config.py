"""What a student's settings refuse, and that they are light to import."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mint_ray.config.loader import UserError, dump, from_data
from mint_ray.students.config import Generation, Student


@pytest.mark.parametrize(
    "changes",
    [
        {"model_id": " "},
        {"lora_rank": 0},
        {"lora_alpha": -3},
        {"lora_dropout": 1.0},
        {"target_modules": ""},
        {"model_id": "bundled:smollm2-135m-instruct", "revision": "main"},
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(changes: dict[str, object]) -> None:
    field, value = list(changes.items())[-1]
    with pytest.raises(UserError, match=field) as caught:
        from_data(Student, {"model_id": "owner/name", **changes})
    assert repr(value) in str(caught.value)


def test_an_answer_of_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="max_new_tokens must be positive, got 0"):
        Generation(max_new_tokens=0)


def test_a_student_survives_being_written_and_read() -> None:
    student = Student(model_id="owner/name", lora_rank=None, dtype="bfloat16")
    assert from_data(Student, dump(student)) == student


def test_importing_the_students_loads_nothing_heavy() -> None:
    code = (
        "import sys, mint_ray.students as s\n"
        "s.student_revision(s.Student(model_id='bundled:smollm2-135m-instruct'))\n"
        "print({'torch', 'transformers', 'peft', 'numpy', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
