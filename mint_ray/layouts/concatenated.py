"""Run every completion in a row of its own behind its own copy of the prompt; the plain reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from mint_ray.layouts import Batch, Example, Head, Logps, bookkeeping, integers
from mint_ray.layouts.head import run_scored, scored_cells
from mint_ray.layouts.images import image_inputs, lay_images, token_kinds


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ConcatenatedLayout:
    """Right-padded rows [prompt | completion] with the usual 2-D mask; serves every causal model."""

    head: Head = "chunked"
    name: ClassVar[str] = "concatenated"

    def lay_out(self, examples: Sequence[Example], *, score_prompt: bool) -> Batch:
        """Tokens and mask (C, W) and where to read each scored token's logit."""
        rows = [example.prompt_ids + completion for example in examples for completion in example.completions]
        width = max(len(row) for row in rows)
        cells: list[int] = []
        targets: list[int] = []
        prompt_cells: list[int] = []
        prompt_targets: list[int] = []
        start = 0
        for example in examples:
            prompt = len(example.prompt_ids)
            if score_prompt:
                prompt_cells += [start + index - 1 for index in example.scored_prompt]
                prompt_targets += [example.prompt_ids[index] for index in example.scored_prompt]
            for completion in example.completions:
                cells += range(start + prompt - 1, start + prompt - 1 + len(completion))
                targets += completion
                start += width
        input_ids = integers([row + [0] * (width - len(row)) for row in rows])
        return {
            "input_ids": input_ids,
            "attention_mask": integers([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
            # a prompt is run again for each completion, and so is its image
            **lay_images(input_ids, [example for example in examples for _ in example.completions]),
            **scored_cells(cells, targets, prompt_cells, prompt_targets),
            **bookkeeping(examples, score_prompt=score_prompt, row_tokens=sum(len(row) for row in rows)),
        }

    def run(self, model: nn.Module, batch: Batch) -> Logps:
        """One forward pass."""
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        return run_scored(model, inputs | image_inputs(batch) | token_kinds(model, batch), batch, self.head)
