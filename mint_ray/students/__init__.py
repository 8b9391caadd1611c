"""Students: the language models that are aligned (weights, tokenizer, adapter). Importing this loads no torch.

`students.loading` loads and saves a student, `students.generation` lets it answer prompts.
"""

from mint_ray.students.checks import check_images
from mint_ray.students.config import Generation, Student

__all__ = ["Generation", "Student", "check_images"]
