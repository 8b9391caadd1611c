"""Loading of a student's tokenizer, processor and model, with or without its adapter, and saving of trained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from mint_ray.config.loader import UserError
from mint_ray.layouts.images import unwrap_model
from mint_ray.models.architectures import auto_class
from mint_ray.models.pretrained import resolve_model, takes_images
from mint_ray.models.vision_processor import VisionProcessor
from mint_ray.students.adapters import add_adapter, freeze_vision_tower, select_trainable
from mint_ray.students.config import Student


def load_tokenizer(student: Student) -> Any:
    """Return the student's tokenizer, with a pad token.

    Raises:
        UserError: The tokenizer has no chat template or no EOS token.
    """
    model = resolve_model(student, "student")
    tokenizer = AutoTokenizer.from_pretrained(model.path, revision=model.revision, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise UserError(f"model_id: {student.model_id}: its tokenizer has no chat template; use an instruct model")
    if tokenizer.eos_token is None:
        raise UserError(f"model_id: {student.model_id}: its tokenizer has no EOS token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_vision_processor(student: Student) -> VisionProcessor | None:
    """Return the processor of a vision-language student, None for a text student."""
    model = resolve_model(student, "student")
    return VisionProcessor(model) if takes_images(model) else None


def load_processor(student: Student) -> Any:
    """Return what is saved next to the student's weights: its tokenizer, or the processor that contains it."""
    vision_processor = load_vision_processor(student)
    return vision_processor.processor if vision_processor else load_tokenizer(student)


def load_model(student: Student, *, adapter: Path | None = None, trainable: bool = False) -> Any:
    """Return the student's model on the CPU, for inference (adapter merged, evaluation mode) or for training.

    With `lora_rank`, a trainable model is wrapped by PEFT, so that only the adapter gets gradients. New LoRA weights
    come from torch's global random generator, which the caller seeds. Components of a vision-language student that are
    not trained are frozen (`adapters.freeze_vision_tower`).

    Args:
        student: Settings of the student.
        adapter: Folder from `save_adapter`; None for the base model.
        trainable: Prepare the model for training.

    Raises:
        UserError: `adapter` was saved with another `lora_rank` setting: an adapter instead of a model, or vice versa.
    """
    base = resolve_model(student, "student")
    path, revision = base.path, base.revision
    if adapter is not None:
        expected = "config.json" if student.lora_rank is None else "adapter_config.json"
        if not (adapter / expected).is_file():
            raise UserError(f"{adapter}: no {expected}, but lora_rank is {student.lora_rank}")
        if student.lora_rank is None:
            path, revision = str(adapter), None
    model = auto_class(base).from_pretrained(
        path,
        revision=revision,
        trust_remote_code=False,
        use_safetensors=True,
        attn_implementation="sdpa",
        dtype=getattr(torch, student.dtype),
    )
    if student.lora_rank is not None and adapter is not None:
        model = PeftModel.from_pretrained(model, adapter, is_trainable=trainable)
        if not trainable:
            model = model.merge_and_unload()
    return _prepare_training(model, student, is_vlm=takes_images(base)) if trainable else model.eval()


def save_adapter(model: Any, processor: Any, path: Path) -> None:
    """Write the trained weights (the adapter, or the whole model) as safetensors to `path`, and the processor."""
    if isinstance(model, PeftModel):
        # vocabularies are never resized here, and checking for that would contact the Hub
        model.save_pretrained(path, save_embedding_layers=False)
    else:
        model.save_pretrained(path)
    processor.save_pretrained(path)


def _prepare_training(model: Any, student: Student, *, is_vlm: bool) -> Any:
    """Return the model in training mode, with an adapter if the settings ask for one that is not loaded yet."""
    if student.lora_rank is not None and not isinstance(model, PeftModel):
        model = add_adapter(model, student, is_vlm=is_vlm)
        model.peft_config["default"].base_model_name_or_path = student.model_id
    elif student.lora_rank is None and is_vlm:
        select_trainable(model, student)
    model.train()
    if is_vlm:
        freeze_vision_tower(unwrap_model(model))
    return model
