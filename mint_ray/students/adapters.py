"""The trainable weights of a student: LoRA adapters, components that are trained in full, and frozen ones."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from mint_ray.config.loader import UserError
from mint_ray.students.config import Component, Student

MERGER = re.compile(r"(^|\.)(deepstack_)?merger(_list)?(\.|$)")
"""Name of Qwen's projector, which is part of its vision tower's module."""


def component_lookup(model: Any) -> Callable[[str], Component]:
    """Return a function from the name of a module or weight of a vision-language `model` to its component."""
    names = {id(module): name for name, module in model.named_modules()}
    text, tower = names[id(model.get_decoder())], names[id(model.get_encoder("image"))]

    def component_of(name: str) -> Component:
        if _is_inside(name, text) or not _is_inside(name, model.base_model_prefix):
            return "language"
        return "vision" if _is_inside(name, tower) and not MERGER.search(name.removeprefix(tower)) else "projector"

    return component_of


def add_adapter(model: Any, student: Student, *, is_vlm: bool, **options: Any) -> Any:
    """Return `model` wrapped by PEFT: LoRA weights on `lora_components`, and `modules_to_save` trained in full.

    Args:
        model: The base model.
        student: Settings of the adapter.
        is_vlm: True for a vision-language model. A text model gets LoRA weights on all `target_modules`.
        **options: Options of `peft.get_peft_model`.

    Raises:
        UserError: `target_modules` matches no layer.
    """
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=student.lora_rank,
        lora_alpha=student.lora_alpha,
        lora_dropout=student.lora_dropout,
        target_modules=_target_modules(model, student) if is_vlm else student.target_modules,
        modules_to_save=_modules_to_save(model, student) if is_vlm else None,
        # the name in the config, because a cache folder means nothing on another machine
        base_model_name_or_path=student.model_id,
        revision=student.revision,
    )
    adapted = get_peft_model(model, lora, **options)
    for module in adapted.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for copy in module.modules_to_save.values():
                _train_in_float32(copy)
    return adapted


def select_trainable(model: Any, student: Student) -> None:
    """Make all weights of `lora_components` and `modules_to_save` trainable and freeze all others.

    This is for a vision-language student without `lora_rank`.
    """
    component_of = component_lookup(model)
    for name, weight in model.named_parameters():
        weight.requires_grad_(component_of(name) in (*student.lora_components, *student.modules_to_save))


def freeze_vision_tower(model: Any) -> None:
    """Keep a vision tower without trainable weights in evaluation mode, and run it without gradients.

    Its activations are not stored, dropout stays off, and running statistics stay unchanged, even in training mode.
    Nothing is changed if a weight of the vision encoder is trained. `model` is the transformers model, with an adapter
    or without.
    """
    component_of = component_lookup(model)
    if any(weight.requires_grad and component_of(name) == "vision" for name, weight in model.named_parameters()):
        # gradients of the trained weights have to pass through all modules behind them
        return
    [tower] = [name for name, module in model.named_modules() if module is model.get_encoder("image")]
    for name, module in model.named_modules():
        # the projector inside Qwen's tower is trained
        if _is_inside(name, tower) and component_of(name) == "vision" and not _is_trainable(module):
            module.eval()
            vars(module)["train"] = functools.partial(_ignore_mode, module)
            vars(module)["forward"] = torch.no_grad()(module.forward)


def _is_trainable(module: nn.Module) -> bool:
    return any(weight.requires_grad for weight in module.parameters())


def _ignore_mode(module: nn.Module, mode: bool = True) -> nn.Module:  # noqa: ARG001 -- the signature of nn.Module.train
    return module


def _target_modules(model: Any, student: Student) -> list[str]:
    """Return the names of the layers in `lora_components` that `target_modules` matches."""
    component_of = component_lookup(model)
    pattern = None if student.target_modules == "all-linear" else re.compile(student.target_modules)
    layers = [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) if pattern is None else pattern.fullmatch(name))
        and module is not model.get_output_embeddings()
        and component_of(name) in student.lora_components
    ]
    if not layers and student.lora_components:
        raise UserError(
            f"target_modules: {student.target_modules!r} matches no layer of {', '.join(student.lora_components)} in "
            f"{student.model_id}"
        )
    return layers


def _modules_to_save(model: Any, student: Student) -> list[str]:
    """Return the names of the outermost modules that lie entirely in the components `modules_to_save`."""
    component_of = component_lookup(model)
    found: list[str] = []
    for name, module in model.named_modules():
        weights = [f"{name}.{inner}" for inner, _ in module.named_parameters()]
        if not weights or any(_is_inside(name, outer) for outer in found):
            continue
        if name and all(component_of(weight) in student.modules_to_save for weight in weights):
            found.append(name)
    return found


def _train_in_float32(module: nn.Module) -> None:
    """Convert a module to float32, as PEFT does with LoRA weights: in half precision, small updates would be lost.

    Its inputs and outputs keep the model's format. Training engines that convert all weights may still do so.
    """
    dtype = next(module.parameters()).dtype
    if dtype not in (torch.bfloat16, torch.float16):
        return

    def convert_inputs(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        own = next(module.parameters()).dtype
        return tuple(given.to(own) if torch.is_floating_point(given) else given for given in arguments)

    def convert_output(module: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:  # noqa: ARG001 -- the signature of a forward hook
        return output.to(dtype)

    module.float()
    module.register_forward_pre_hook(convert_inputs)
    module.register_forward_hook(convert_output)


def _is_inside(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")
