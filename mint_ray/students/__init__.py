"""Students: the language models that are aligned (weights, tokenizer, adapter). Importing this loads no torch.

`students.checks` checks that a student fits its task, `students.loading` loads and saves it, `students.generation` lets
it answer prompts.
"""

from mint_ray.students.config import Generation, Student

__all__ = ["Generation", "Student"]
