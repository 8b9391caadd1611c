"""Log-probabilities of many completions of one prompt.

Tested by tests/teachers/test_generative.py and tests/students/test_constrained_decoding.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from mint_ray.layouts import Example, ImageInputs, Layout

COMPLETIONS_PER_PASS = 256
"""Maximum number of completions in one forward pass; constant, so that a score depends on its record alone."""

LengthNormalization = Literal["mean", "sum"]


@torch.inference_mode()
def completion_scores(
    model: nn.Module,
    layout: Layout,
    prompt_ids: Sequence[int],
    completions: Sequence[Sequence[int]],
    *,
    length_normalization: LengthNormalization,
    record_id: str = "",
    image: ImageInputs | None = None,
) -> list[float]:
    """Return the log-probability of each completion given the prompt, in order.

    The prompt runs once per `COMPLETIONS_PER_PASS` completions.

    Args:
        model: A causal language model.
        layout: A layout that `choose_layout` has chosen for `model`.
        prompt_ids: Tokens of the prompt, image tokens included.
        completions: Tokens of the completions.
        length_normalization: `sum` of the log-probabilities of a completion's tokens, or their `mean`.
        record_id: Id of the record in error messages.
        image: The image that the prompt has tokens for.
    """
    device = next(model.parameters()).device
    scores: list[float] = []
    for start in range(0, len(completions), COMPLETIONS_PER_PASS):
        chunk = [list(completion) for completion in completions[start : start + COMPLETIONS_PER_PASS]]
        example = Example(record_id=record_id, prompt_ids=list(prompt_ids), completions=chunk, pairs=[], image=image)
        batch = layout.collate([example], score_prompt=False)
        logps = layout.compute_logps(model, {name: tensor.to(device) for name, tensor in batch.items()})
        scores += (logps.means if length_normalization == "mean" else logps.sums).tolist()
    return scores
