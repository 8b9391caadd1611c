"""Run every completion in a row of its own behind its own copy of the prompt; the plain reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mint_ray.layouts import Batch, Example, Logps, bookkeeping, integers, select_logps


class ConcatenatedLayout:
    """Right-padded rows [prompt | completion] with the usual 2-D mask; serves every causal model."""

    name = "concatenated"

    def lay_out(self, examples: Sequence[Example], *, score_prompt: bool) -> Batch:
        """Tokens and mask (C, W) and where to read each scored token's logit in the flattened rows."""
        rows = [example.prompt_ids + completion for example in examples for completion in example.completions]
        width = max(len(row) for row in rows)
        source: list[int] = []
        target: list[int] = []
        prompt_source: list[int] = []
        prompt_target: list[int] = []
        start = 0
        for example in examples:
            prompt = len(example.prompt_ids)
            if score_prompt:
                prompt_source += range(start, start + prompt - 1)
                prompt_target += example.prompt_ids[1:]
            for completion in example.completions:
                source += range(start + prompt - 1, start + prompt - 1 + len(completion))
                target += completion
                start += width
        return {
            "input_ids": integers([row + [0] * (width - len(row)) for row in rows]),
            "attention_mask": integers([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
            "source_N": integers(source),
            "target_N": integers(target),
            "prompt_source_N": integers(prompt_source),
            "prompt_target_N": integers(prompt_target),
            **bookkeeping(examples, score_prompt=score_prompt, row_tokens=sum(len(row) for row in rows)),
        }

    def run(self, model: nn.Module, batch: Batch) -> Logps:
        """One forward pass with the logits of every token."""
        logits_BTV = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        cells = torch.cat([batch["source_N"], batch["prompt_source_N"]])
        needed_M, source_N = torch.unique(cells, return_inverse=True)
        targets = torch.cat([batch["target_N"], batch["prompt_target_N"]])
        logps_N = select_logps(logits_BTV.flatten(0, 1)[needed_M], source_N, targets)
        scored = len(batch["source_N"])
        return Logps(
            token_logps_N=logps_N[:scored],
            counts_C=batch["counts_C"],
            prompt_token_logps_N=logps_N[scored:],
            prompt_counts_B=batch["prompt_counts_B"],
        )
