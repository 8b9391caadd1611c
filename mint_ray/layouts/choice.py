"""The choice of the fastest layout that reproduces a model's own log-probabilities."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mint_ray.config.loader import one_line
from mint_ray.layouts import Example, Layout, Logps
from mint_ray.layouts.concatenated import ConcatenatedLayout
from mint_ray.layouts.masks import SPLIT_SDPA, get_attn_implementation, set_attn_implementation
from mint_ray.layouts.shared_prefix import SharedPrefixLayout

logger = logging.getLogger(__name__)

MAX_LOGP_DIFFERENCE = 1e-3
"""Maximum difference of any token log-probability between two layouts in float32. A wrong mask or position changes some
by 0.1."""

MAX_HALF_LOGP_RMS = 0.2
"""Maximum root-mean-square difference in half precision. Rows of another shape round differently, which changes one
token in a hundred by 0.4. On SmolLM2-135M rounding amounts to 0.06 to 0.08, positions that do not restart to 0.64 or
more, a missing mask to 1.6 or more."""


def choose_layout(model: nn.Module, examples: Sequence[Example], *, max_tokens_per_row: int | None = None) -> Layout:
    """Return the shared-prefix layout if `model` gives the same log-probabilities with it, else the concatenated one.

    Models with their own position or attention rules give other values or reject the arguments; models that change
    their logits after the LM head do not support chunked logits. The reference is the plainest form, all logits of one
    row per completion; the others are tried on `examples`, fastest first, until one agrees. The attention
    implementation of a model that uses sdpa is set to `masks.SPLIT_SDPA` if that agrees.
    """
    plainest = ConcatenatedLayout(logits="all")
    own = get_attn_implementation(model)
    expected = _compute_logps(plainest, model, examples)
    is_exact = next(model.parameters()).dtype in (torch.float32, torch.float64)
    tolerance = MAX_LOGP_DIFFERENCE if is_exact else MAX_HALF_LOGP_RMS
    shared: list[Layout] = [
        SharedPrefixLayout(max_tokens_per_row=max_tokens_per_row),
        SharedPrefixLayout(max_tokens_per_row=max_tokens_per_row, logits="selected"),
    ]
    candidates: list[tuple[str | None, Layout]] = [
        *((SPLIT_SDPA, layout) for layout in shared if own == "sdpa"),
        *((own, layout) for layout in shared),
        (own, ConcatenatedLayout()),
    ]
    for attention, layout in candidates:
        description = f"{layout.name}, {layout.logits} logits, {attention} attention"
        try:
            set_attn_implementation(model, attention)
            differences_N = _differences(_compute_logps(layout, model, examples), expected)
        except Exception as error:
            # a third-party model may raise anything on our arguments; another layout supports it
            logger.warning("layout: rejected %s: %s", description, one_line(error))
            continue
        difference = float(differences_N.abs().max() if is_exact else differences_N.square().mean().sqrt())
        if difference <= tolerance:
            logger.info("layout: %s; token log-probabilities agree within %.2g", description, difference)
            return layout
        logger.warning("layout: rejected %s: token log-probabilities differ by %.2g", description, difference)
    logger.warning("layout: %s, %s logits: the model supports no other", plainest.name, plainest.logits)
    return plainest


def _compute_logps(layout: Layout, model: nn.Module, examples: Sequence[Example]) -> Logps:
    batch = layout.collate(examples, score_prompt=True)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return layout.compute_logps(model, {name: tensor.to(device) for name, tensor in batch.items()})
    finally:
        model.train(was_training)


def _differences(logps: Logps, expected: Logps) -> Tensor:
    """Return the differences of all scored tokens; shape (tokens,)."""
    return torch.cat(
        [
            logps.token_logps - expected.token_logps,
            logps.prompt_token_logps - expected.prompt_token_logps,
        ]
    )
