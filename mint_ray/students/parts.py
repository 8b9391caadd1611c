"""Tell the parts of a student that sees apart, lay low-rank weights over some, train some whole, freeze the rest."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from mint_ray.loading import UserError
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
    return get_peft_model(model, lora, **options)


def train_parts(model: Any, config: Student) -> None:
    """Let every weight of `lora_parts` and `whole_parts` learn, and none besides: for a student without `lora_rank`."""
    part_of = tell_parts(model)
    for name, weight in model.named_parameters():
        weight.requires_grad_(part_of(name) in (*config.lora_parts, *config.whole_parts))


def rest(module: nn.Module) -> None:
    """Keep what learns nothing within `module` as it is, in training too: no gradient and no activations kept for one,
    no dropout, no running mean that goes on running."""
    if any(weight.requires_grad for weight in module.parameters()):
        for child in module.children():
            rest(child)
        return
    module.eval()
    vars(module)["train"] = lambda mode=True: module
    vars(module)["forward"] = torch.no_grad()(module.forward)


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


def _lies_in(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")
