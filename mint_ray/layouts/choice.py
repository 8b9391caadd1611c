"""Choose the fastest layout that gives a model's own log-probabilities."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mint_ray.layouts import Example, Layout, Logps
from mint_ray.layouts.concatenated import ConcatenatedLayout
from mint_ray.layouts.masks import SPLIT, attention_of, set_attention
from mint_ray.layouts.shared_prefix import SharedPrefixLayout

logger = logging.getLogger(__name__)

SAME_LOGPS = 1e-3
"""Two layouts agree if no float32 token log-probability differs by more; a lost mask or position moves some by 0.1."""

SAME_HALF_LOGPS = 0.2
"""The same in half precision, of the root mean square: rows of another shape round otherwise, which moves one token
in a hundred by 0.4. On SmolLM2-135M rounding comes to 0.06 to 0.08, a lost restart of positions to 0.64 or more, a lost
mask to 1.6 or more."""


def choose_layout(model: nn.Module, examples: Sequence[Example], *, row_tokens: int | None = None) -> Layout:
    """The shared prefix if `model` gives the same token log-probabilities with it, otherwise the concatenated layout.

    A model with position or attention rules of its own gives others, or refuses the arguments; one that changes its
    logits behind its head cannot have them in chunks. Runs `examples` through the plainest form, all logits of one row
    per completion, and through the others, fastest first, until one agrees. A model that computes attention by sdpa is
    left with `masks.split_attention` if it serves.
    """
    plainest = ConcatenatedLayout(head="all")
    own = attention_of(model)
    expected = _run(plainest, model, examples)
    is_exact = next(model.parameters()).dtype in (torch.float32, torch.float64)
    tolerance = SAME_LOGPS if is_exact else SAME_HALF_LOGPS
    shared: list[Layout] = [
        SharedPrefixLayout(row_tokens=row_tokens),
        SharedPrefixLayout(row_tokens=row_tokens, head="rows"),
    ]
    attempts: list[tuple[str | None, Layout]] = [
        *((SPLIT, layout) for layout in shared if own == "sdpa"),
        *((own, layout) for layout in shared),
        (own, ConcatenatedLayout()),
    ]
    for attention, layout in attempts:
        described = f"{layout.name}, {layout.head} logits, {attention} attention"
        try:
            set_attention(model, attention)
            differences_N = _differences(_run(layout, model, examples), expected)
        except Exception as error:
            # whatever a model of someone else's makes of our arguments, it is served by another layout
            logger.warning("layout: not %s: %s", described, " ".join(str(error).split()))
            continue
        difference = float(differences_N.abs().max() if is_exact else differences_N.square().mean().sqrt())
        if difference <= tolerance:
            logger.info("layout: %s; token log-probabilities agree within %.2g", described, difference)
            return layout
        logger.warning("layout: not %s: token log-probabilities differ by %.2g", described, difference)
    logger.warning("layout: %s, %s logits, for nothing else serves the model", plainest.name, plainest.head)
    return plainest


def _run(layout: Layout, model: nn.Module, examples: Sequence[Example]) -> Logps:
    batch = layout.lay_out(examples, score_prompt=True)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return layout.run(model, {name: tensor.to(device) for name, tensor in batch.items()})
    finally:
        model.train(was_training)


def _differences(logps: Logps, expected: Logps) -> Tensor:
    """Of every scored token."""
    return torch.cat(
        [
            logps.token_logps_N - expected.token_logps_N,
            logps.prompt_token_logps_N - expected.prompt_token_logps_N,
        ]
    )
