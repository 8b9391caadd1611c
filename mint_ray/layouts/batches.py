"""The tensors of a batch that do not depend on the layout, and sums over the tokens of a completion.

Tested by tests/layouts/test_shared_prefix.py and tests/layouts/test_layouts.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mint_ray.layouts import Batch, Example


def pair_tensors(examples: Sequence[Example], *, score_prompt: bool, num_tokens: int) -> Batch:
    """Return the tensors of a `Batch` that every layout has: pairs, counts, normalizers, reference log-probabilities.

    Args:
        examples: The examples of the batch, in order.
        score_prompt: Count the prompts' tokens too.
        num_tokens: Tokens of the forward pass, without padding.
    """
    chosen, rejected, record = [], [], []
    first = 0
    for index, example in enumerate(examples):
        for pair in example.pairs:
            chosen.append(first + pair[0])
            rejected.append(first + pair[1])
            record.append(index)
        first += len(example.completions)
    counts_C = int_tensor([len(completion) for example in examples for completion in example.completions])
    prompt_counts_B = int_tensor([len(example.scored_prompt_indices) if score_prompt else 0 for example in examples])
    chosen_P, record_P = int_tensor(chosen), int_tensor(record)
    batch = {
        "chosen_P": chosen_P,
        "rejected_P": int_tensor(rejected),
        "record_P": record_P,
        "counts_C": counts_C,
        "prompt_counts_B": prompt_counts_B,
        "nll_tokens": counts_C[chosen_P].sum() + prompt_counts_B[record_P].sum(),
        "pairs": int_tensor(len(chosen)),
        "num_tokens": int_tensor(num_tokens),
    }
    if all(example.reference_logps is not None for example in examples if example.pairs):
        reference = [example.reference_logps or [0.0] * len(example.completions) for example in examples]
        batch["reference_C"] = torch.tensor([logp for logps in reference for logp in logps], dtype=torch.float32)
    return batch


def int_tensor(values: Any) -> Tensor:
    """Return an int64 tensor, so that an empty list can be used as an index too."""
    return torch.tensor(values, dtype=torch.long)


def segment_sum(values_N: Tensor, counts: Tensor) -> Tensor:
    """Return the sum of each run of consecutive values; `counts` are the lengths of the runs."""
    # output_size spares a GPU the synchronization that reading the counts would take
    segments = torch.arange(len(counts), device=counts.device)
    segment_N = torch.repeat_interleave(segments, counts, output_size=len(values_N))
    return values_N.new_zeros(len(counts)).index_add(0, segment_N, values_N)
