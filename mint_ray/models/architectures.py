"""Tell from its `config.json` which class of transformers a model is; classes of our own are made known here."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import mint_ray.models.vision_towers  # noqa: F401  -- the vision tower of students that are joined
from mint_ray.config.loader import UserError
from mint_ray.models.pretrained import Place, sees_images


def load_config(place: Place) -> Any:
    """The model's configuration as transformers has it. Raises UserError for an unknown architecture."""
    try:
        # what checks a model has brought its config.json here
        return AutoConfig.from_pretrained(
            place.path, revision=place.revision, local_files_only=True, trust_remote_code=False
        )
    except ValueError as error:
        raise UserError(f"model_id: {place.model_id}: {' '.join(str(error).split())}") from error


def model_class(place: Place) -> Any:
    """The auto class that loads the model. Raises UserError for a model of images that answers no prompts."""
    if not sees_images(place):
        return AutoModelForCausalLM
    found = load_config(place)
    if type(found) not in AutoModelForImageTextToText._model_mapping:
        raise UserError(
            f"model_id: {place.model_id}: a {found.model_type} model takes no images and text for an answer"
        )
    return AutoModelForImageTextToText
