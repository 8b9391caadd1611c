"""The transformers class that loads a model, chosen by its `config.json`."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from mint_ray.config.loader import UserError, one_line
from mint_ray.models.pretrained import PretrainedModel, takes_images
from mint_ray.models.vision_towers import register_vision_towers


def load_config(model: PretrainedModel) -> Any:
    """Return the model's transformers config, from a folder or the local cache of the Hub.

    Raises:
        UserError: transformers does not know the architecture.
    """
    register_vision_towers()
    try:
        # `check_model` has downloaded config.json
        return AutoConfig.from_pretrained(
            model.path, revision=model.revision, local_files_only=True, trust_remote_code=False
        )
    except ValueError as error:
        raise UserError(f"model_id: {model.model_id}: {one_line(error)}") from error


def auto_class(model: PretrainedModel) -> Any:
    """Return the auto class that loads the model: for text, or for images and text.

    Raises:
        UserError: The model takes images but does not generate text.
    """
    if not takes_images(model):
        return AutoModelForCausalLM
    config = load_config(model)
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise UserError(
            f"model_id: {model.model_id}: a {config.model_type} model does not generate text from images and text"
        )
    return AutoModelForImageTextToText
