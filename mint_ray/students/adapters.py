"""Tell the parts of a student that sees apart, lay low-rank weights over some, train some whole, freeze the rest."""

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
from mint_ray.students.config import Part, Student

BETWEEN = re.compile(r"(^|\.)(deepstack_)?merger(_list)?(\.|$)")
"""Qwen's projector, which lies inside its vision tower."""


def tell_parts(model: Any) -> Callable[[str], Part]:
    """Tells by its name which part of a model for images and text a module or weight belongs to."""
    names = {id(module): name for name, module in model.named_modules()}
    text, tower = names[id(model.get_decoder())], names[id(model.get_encoder("image"))]

    def part_of(name: str) -> Part:
        if _lies_in(name, text) or not _lies_in(name, model.base_model_prefix):
            return "language"
        return "vision" if _lies_in(name, tower) and not BETWEEN.search(name.removeprefix(tower)) else "projector"

    return part_of


def lay_adapter(model: Any, config: Student, *, sees: bool, **options: Any) -> Any:
    """`model` wrapped by PEFT: low-rank weights over `lora_parts`, `whole_parts` trained in every weight.

    A model that reads has one part. `options` are PEFT's own. Raises UserError if `target_modules` names no layer.
    """
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=_layers(model, config) if sees else config.target_modules,
        modules_to_save=_whole(model, config) if sees else None,
        # the name in the config, since a cache folder means nothing on another machine
        base_model_name_or_path=config.model_id,
        revision=config.revision,
    )
    adapted = get_peft_model(model, lora, **options)
    for module in adapted.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for copy in module.modules_to_save.values():
                _step_in_float32(copy)
    return adapted


def train_parts(model: Any, config: Student) -> None:
    """Let every weight of `lora_parts` and `whole_parts` learn, and none besides: for a student without `lora_rank`."""
    part_of = tell_parts(model)
    for name, weight in model.named_parameters():
        weight.requires_grad_(part_of(name) in (*config.lora_parts, *config.whole_parts))


def rest(model: Any) -> None:
    """Keep what sees as it is in training too, if none of it learns: no gradient and no activations kept for one, no
    dropout, no running mean that goes on running. `model` is that of transformers, adapted or not."""
    part_of = tell_parts(model)
    if any(weight.requires_grad and part_of(name) == "vision" for name, weight in model.named_parameters()):
        # a gradient that is on its way down passes through what has no weights too
        return
    [tower] = [name for name, module in model.named_modules() if module is model.get_encoder("image")]
    for name, module in model.named_modules():
        # in Qwen's tower the projector learns
        if _lies_in(name, tower) and part_of(name) == "vision" and not _learns(module):
            module.eval()
            vars(module)["train"] = functools.partial(_stay, module)
            vars(module)["forward"] = torch.no_grad()(module.forward)


def _learns(module: nn.Module) -> bool:
    return any(weight.requires_grad for weight in module.parameters())


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def _layers(model: Any, config: Student) -> list[str]:
    part_of = tell_parts(model)
    wanted = None if config.target_modules == "all-linear" else re.compile(config.target_modules)
    layers = [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) if wanted is None else wanted.fullmatch(name))
        and module is not model.get_output_embeddings()
        and part_of(name) in config.lora_parts
    ]
    if not layers and config.lora_parts:
        raise UserError(
            f"target_modules: {config.target_modules!r} names no layer of {', '.join(config.lora_parts)} in "
            f"{config.model_id}"
        )
    return layers


def _whole(model: Any, config: Student) -> list[str]:
    """The largest modules that lie in one of `whole_parts` with all that they hold."""
    part_of = tell_parts(model)
    found: list[str] = []
    for name, module in model.named_modules():
        held = [f"{name}.{inside}" for inside, _ in module.named_parameters()]
        if not held or any(_lies_in(name, outer) for outer in found):
            continue
        if name and all(part_of(weight) in config.whole_parts for weight in held):
            found.append(name)
    return found


def _step_in_float32(module: nn.Module) -> None:
    """Keep in float32, as PEFT keeps low-rank weights, what a small step would be lost on in half precision.

    It takes and gives what its neighbours compute in; an engine that turns all weights into one format may.
    """
    around = next(module.parameters()).dtype
    if around not in (torch.bfloat16, torch.float16):
        return

    def take(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        dtype = next(module.parameters()).dtype
        return tuple(given.to(dtype) if torch.is_floating_point(given) else given for given in arguments)

    def give(module: nn.Module, arguments: tuple[Any, ...], result: torch.Tensor) -> torch.Tensor:
        return result.to(around)

    module.float()
    module.register_forward_pre_hook(take)
    module.register_forward_hook(give)


def _lies_in(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")
