"""How likely a model finds each of many completions behind one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from mint_ray.layouts import Example, Image, Layout

COMPLETIONS_PER_PASS = 256
"""Most completions behind one prompt in one forward pass; a fixed cut, so that a score depends on its record alone."""

Normalise = Literal["mean", "sum"]


@torch.inference_mode()
def completion_scores(
    model: nn.Module,
    layout: Layout,
    prompt_ids: Sequence[int],
    completions: Sequence[Sequence[int]],
    *,
    normalise: Normalise,
    record_id: str = "",
    image: Image | None = None,
) -> list[float]:
    """Log-probability of each completion behind the prompt: its mean by token, or its sum; in the order given.

    The prompt runs once for every `COMPLETIONS_PER_PASS` completions. `image` is what the prompt has
    room for; `record_id` is named in errors.
    """
    device = next(model.parameters()).device
    scores: list[float] = []
    for start in range(0, len(completions), COMPLETIONS_PER_PASS):
        some = [list(completion) for completion in completions[start : start + COMPLETIONS_PER_PASS]]
        example = Example(record_id=record_id, prompt_ids=list(prompt_ids), completions=some, pairs=[], image=image)
        batch = layout.lay_out([example], score_prompt=False)
        logps = layout.run(model, {name: tensor.to(device) for name, tensor in batch.items()})
        scores += (logps.means_C if normalise == "mean" else logps.sums_C).tolist()
    return scores
