"""The plain layout, used as the reference: one row [prompt | completion] per completion.

Tested by tests/layouts/test_shared_prefix.py and tests/layouts/test_images.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from mint_ray.layouts import Batch, Example, LogitsMode, Logps
from mint_ray.layouts.batches import int_tensor, pair_tensors
from mint_ray.layouts.images import collate_images, image_kwargs, token_type_kwargs
from mint_ray.layouts.lm_head import logit_index, scored_logps


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ConcatenatedLayout:
    """Right-padded rows [prompt | completion] with a 2-D attention mask; works for every causal model."""

    logits: LogitsMode = "chunked"
    name: ClassVar[str] = "concatenated"

    def collate(self, examples: Sequence[Example], *, score_prompt: bool) -> Batch:
        """Return tokens and mask (C, W), and the position of each scored token's logit."""
        rows = [example.prompt_ids + completion for example in examples for completion in example.completions]
        width = max(len(row) for row in rows)
        positions: list[int] = []
        targets: list[int] = []
        prompt_positions: list[int] = []
        prompt_targets: list[int] = []
        start = 0
        for example in examples:
            prompt = len(example.prompt_ids)
            if score_prompt:
                prompt_positions += [start + index - 1 for index in example.scored_prompt_indices]
                prompt_targets += [example.prompt_ids[index] for index in example.scored_prompt_indices]
            for completion in example.completions:
                positions += range(start + prompt - 1, start + prompt - 1 + len(completion))
                targets += completion
                start += width
        input_ids = int_tensor([row + [0] * (width - len(row)) for row in rows])
        return {
            "input_ids": input_ids,
            "attention_mask": int_tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
            # a prompt is repeated for each completion, and so is its image
            **collate_images(input_ids, [example for example in examples for _ in example.completions]),
            **logit_index(positions, targets, prompt_positions, prompt_targets),
            **pair_tensors(examples, score_prompt=score_prompt, num_tokens=sum(len(row) for row in rows)),
        }

    def compute_logps(self, model: nn.Module, batch: Batch) -> Logps:
        """Run one forward pass."""
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        return scored_logps(model, inputs | image_kwargs(batch) | token_type_kwargs(model, batch), batch, self.logits)
