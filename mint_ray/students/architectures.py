"""Tell from its `config.json` which class of transformers a student is; classes of our own are made known here."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import mint_ray.students.towers  # noqa: F401  -- the vision tower of students that are joined
from mint_ray.loading import UserError
from mint_ray.students.config import Student
from mint_ray.students.weights import resolve_path, sees_images


def load_config(config: Student) -> Any:
    """The student's configuration as transformers has it. Raises UserError for an unknown architecture."""
    try:
        # what checks a student has brought its config.json here
        return AutoConfig.from_pretrained(
            resolve_path(config), revision=config.revision, local_files_only=True, trust_remote_code=False
        )
    except ValueError as error:
        raise UserError(f"model_id: {config.model_id}: {' '.join(str(error).split())}") from error


def model_class(config: Student) -> Any:
    """The auto class that loads the student. Raises UserError for a model of images that answers no prompts."""
    if not sees_images(config):
        return AutoModelForCausalLM
    found = load_config(config)
    if type(found) not in AutoModelForImageTextToText._model_mapping:
        raise UserError(
            f"model_id: {config.model_id}: a {found.model_type} model takes no images and text for an answer"
        )
    return AutoModelForImageTextToText
