"""How a prompt and its completions are laid out in one forward pass, and the log-probabilities that come back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from mint_ray.config.loader import UserError

Batch = dict[str, Tensor]
"""Tensors that a layout writes and reads back, integers but for `reference_C`. Beside what the layout keeps for itself:

`input_ids` (rows, W) comes first; `chosen_P`, `rejected_P` (P,) index the batch's completions and `record_P` its
examples, one per pair; `counts_C` (C,) and `prompt_counts_B` (B,) count scored tokens; `nll_tokens`, `pairs` and
`row_tokens` (scalars) are the normalisers and the number of tokens that the forward pass runs, padding left out;
`reference_C` (C,) float32, where every example with pairs has them, are log-probabilities under the base student.
`layouts.images` says what a batch with images has besides.
"""

Head = Literal["chunked", "rows", "all"]
"""Where logits are made: on rows that a scored token needs, a few at a time; on all such rows; on every row."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Image:
    """What the processor of a student makes of one image."""

    inputs: dict[str, Tensor]
    """Pixels, and what the model's forward takes beside them, under its names; the first axis counts images."""
    token_id: int
    """The token that stands in the prompt where the image is."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One record as tokens: a prompt, its distinct completions, and which of them is preferred to which."""

    record_id: str
    prompt_ids: list[int]
    completions: list[list[int]]
    pairs: list[tuple[int, int]]
    """(chosen, rejected) as indices into `completions`."""
    reference_logps: list[float] | None = None
    """Log-probability of each completion under the base student, summed over its tokens."""
    image_uri: str | None = None
    """Where the record's image lies, for which the prompt has room."""
    image: Image | None = dataclasses.field(default=None, repr=False)
    """The same read: only an example that is about to be run has it."""

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise UserError(f"record {self.record_id!r}: the prompt has no tokens")
        if any(not completion for completion in self.completions):
            raise UserError(f"record {self.record_id!r}: a completion has no tokens")
        for pair in self.pairs:
            if not all(0 <= index < len(self.completions) for index in pair):
                raise UserError(f"record {self.record_id!r}: pair {pair} of {len(self.completions)} completions")
        if self.reference_logps is not None and len(self.reference_logps) != len(self.completions):
            raise UserError(
                f"record {self.record_id!r}: {len(self.reference_logps)} reference_logps "
                f"for {len(self.completions)} completions"
            )

    @property
    def scored_prompt(self) -> list[int]:
        """Which tokens of the prompt a likelihood counts: all but the first, and those that stand for an image."""
        image_token = self.image.token_id if self.image else None
        return [index for index, token in enumerate(self.prompt_ids) if index and token != image_token]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Logps:
    """Log-probabilities of scored tokens; C completions of B examples, in the order they were given.

    In float32 whatever the model computes in, float64 for a float64 model.
    """

    token_logps_N: Tensor
    """Every completion token, completion after completion."""
    counts_C: Tensor
    prompt_token_logps_N: Tensor
    """Every token of `Example.scored_prompt`, prompt after prompt; empty unless asked for."""
    prompt_counts_B: Tensor

    @property
    def sums_C(self) -> Tensor:
        """Log-probability of each completion."""
        return _sum_by_owner(self.token_logps_N, self.counts_C)

    @property
    def means_C(self) -> Tensor:
        """Mean log-probability per token of each completion; log P(y|x) in ORPO."""
        return self.sums_C / self.counts_C

    @property
    def prompt_sums_B(self) -> Tensor:
        """Log-probability of each prompt given its first token; 0 unless asked for."""
        return _sum_by_owner(self.prompt_token_logps_N, self.prompt_counts_B)


class Layout(Protocol):
    """A way to run examples through a causal language model."""

    @property
    def name(self) -> str: ...

    @property
    def head(self) -> Head: ...

    def lay_out(self, examples: Sequence[Example], *, score_prompt: bool) -> Batch:
        """Write examples as a batch; `score_prompt` asks for the prompt's token log-probabilities too."""
        ...

    def run(self, model: nn.Module, batch: Batch) -> Logps:
        """One forward pass of `model` as it is wrapped (DDP, DeepSpeed, PEFT). Raises UserError if it cannot."""
        ...


def chosen_only(example: Example) -> Example:
    """The same record without the completions that no pair prefers; each pair (i, j) becomes (i, i)."""
    kept = sorted({chosen for chosen, _ in example.pairs})
    index_of = {completion: index for index, completion in enumerate(kept)}
    return dataclasses.replace(
        example,
        completions=[example.completions[index] for index in kept],
        pairs=[(index_of[chosen], index_of[chosen]) for chosen, _ in example.pairs],
        reference_logps=example.reference_logps and [example.reference_logps[index] for index in kept],
    )


def bookkeeping(examples: Sequence[Example], *, score_prompt: bool, row_tokens: int) -> Batch:
    """The part of a batch that does not depend on how tokens are laid out."""
    chosen, rejected, record = [], [], []
    first = 0
    for index, example in enumerate(examples):
        for pair in example.pairs:
            chosen.append(first + pair[0])
            rejected.append(first + pair[1])
            record.append(index)
        first += len(example.completions)
    counts_C = integers([len(completion) for example in examples for completion in example.completions])
    prompt_counts_B = integers([len(example.scored_prompt) if score_prompt else 0 for example in examples])
    chosen_P, record_P = integers(chosen), integers(record)
    batch = {
        "chosen_P": chosen_P,
        "rejected_P": integers(rejected),
        "record_P": record_P,
        "counts_C": counts_C,
        "prompt_counts_B": prompt_counts_B,
        "nll_tokens": counts_C[chosen_P].sum() + prompt_counts_B[record_P].sum(),
        "pairs": integers(len(chosen)),
        "row_tokens": integers(row_tokens),
    }
    if all(example.reference_logps is not None for example in examples if example.pairs):
        reference = [example.reference_logps or [0.0] * len(example.completions) for example in examples]
        batch["reference_C"] = torch.tensor([logp for logps in reference for logp in logps], dtype=torch.float32)
    return batch


def integers(values: Any) -> Tensor:
    """An int64 tensor; an empty list too must be able to index."""
    return torch.tensor(values, dtype=torch.long)


def _sum_by_owner(values_N: Tensor, counts: Tensor) -> Tensor:
    # the number of values is known, so that a GPU need not be waited for to learn it from the counts
    owners = torch.arange(len(counts), device=counts.device)
    owner_N = torch.repeat_interleave(owners, counts, output_size=len(values_N))
    return values_N.new_zeros(len(counts)).index_add(0, owner_N, values_N)
