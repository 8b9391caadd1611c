"""Layouts: the arrangement of prompts and completions in one forward pass, and the log-probabilities that it returns.

Importing this loads no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from mint_ray.config.loader import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

Batch: TypeAlias = "dict[str, Tensor]"
"""Tensors that a layout writes and reads back, of integers except `reference_C`. Besides what the layout keeps for
itself:

`input_ids` (rows, W) comes first. `chosen_P`, `rejected_P` (P,) index the batch's completions and `record_P` its
examples, one entry per pair. `counts_C` (C,) and `prompt_counts_B` (B,) count scored tokens. `nll_tokens`, `pairs` and
`num_tokens` (scalars) are the normalizers and the number of tokens of the forward pass without padding. `reference_C`
(C,) float32, present if every example with pairs has them, are log-probabilities under the base student.
`layouts.images` documents the tensors that a batch with images adds.
"""

LogitsMode = Literal["chunked", "selected", "all"]
"""Rows on which logits are computed: `chunked`: those that a scored token needs, a few at a time; `selected`: all of
those at once; `all`: every row."""

LOGITS_CHUNK_BYTES = 128 * 2**20
"""Maximum bytes of logits in memory at a time: the cost of the loss, for any vocabulary and number of tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImageInputs:
    """Model inputs for one image, as the student's processor returns them."""

    tensors: dict[str, Tensor]
    """Pixels and the other arguments of the model's forward, by name; the first axis counts images."""
    token_id: int
    """Id of the image tokens in the prompt."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One tokenized record: a prompt, its distinct completions, and the pairs of them."""

    record_id: str
    prompt_ids: list[int]
    completions: list[list[int]]
    pairs: list[tuple[int, int]]
    """(chosen, rejected) as indices into `completions`."""
    reference_logps: list[float] | None = None
    """Log-probability of each completion under the base student, summed over its tokens."""
    image_uri: str | None = None
    """URI of the record's image; the prompt contains its image tokens."""
    image: ImageInputs | None = dataclasses.field(default=None, repr=False)
    """The image itself; set only while the example is in use."""

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
    def scored_prompt_indices(self) -> list[int]:
        """Indices of the prompt tokens that a likelihood includes: all but the first and the image tokens."""
        image_token = self.image.token_id if self.image else None
        return [index for index, token in enumerate(self.prompt_ids) if index and token != image_token]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Logps:
    """Log-probabilities of scored tokens, for C completions of B examples in the order of the examples.

    In float32 for any format of the model, except float64 for a float64 model.
    """

    token_logps: Tensor
    """Log-probability of every completion token, completion after completion; shape (tokens,)."""
    counts: Tensor
    """Number of tokens of each completion; shape (C,)."""
    prompt_token_logps: Tensor
    """Log-probability of every token of `Example.scored_prompt_indices`, prompt after prompt; empty unless scored."""
    prompt_counts: Tensor
    """Number of scored tokens of each prompt; shape (B,)."""

    @property
    def sums(self) -> Tensor:
        """Log-probability of each completion; shape (C,)."""
        from mint_ray.layouts.batches import segment_sum

        return segment_sum(self.token_logps, self.counts)

    @property
    def means(self) -> Tensor:
        """Mean log-probability per token of each completion, log P(y|x) in ORPO; shape (C,)."""
        return self.sums / self.counts

    @property
    def prompt_sums(self) -> Tensor:
        """Log-probability of each prompt given its first token, 0 unless requested; shape (B,)."""
        from mint_ray.layouts.batches import segment_sum

        return segment_sum(self.prompt_token_logps, self.prompt_counts)


class Layout(Protocol):
    """A way to run examples through a causal language model."""

    @property
    def name(self) -> str:
        """Name of the layout in logs and manifests."""
        ...

    @property
    def logits(self) -> LogitsMode:
        """Rows on which logits are computed."""
        ...

    def collate(self, examples: Sequence[Example], *, score_prompt: bool) -> Batch:
        """Return the examples as a batch; with `score_prompt` the prompts' tokens are scored too."""
        ...

    def compute_logps(self, model: nn.Module, batch: Batch) -> Logps:
        """Run one forward pass of `model`, which may be wrapped by DDP, DeepSpeed or PEFT.

        Raises UserError if the model does not support the layout.
        """
        ...


def chosen_only(example: Example) -> Example:
    """Return the example without the completions that no pair prefers; each pair (i, j) becomes (i, i)."""
    kept = sorted({chosen for chosen, _ in example.pairs})
    index_of = {completion: index for index, completion in enumerate(kept)}
    return dataclasses.replace(
        example,
        completions=[example.completions[index] for index in kept],
        pairs=[(index_of[chosen], index_of[chosen]) for chosen, _ in example.pairs],
        reference_logps=example.reference_logps and [example.reference_logps[index] for index in kept],
    )
