"""Every layout passes the conformance suite; so does a new one that follows the steps of the README."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import pytest
import torch
from torch import nn

from mint_ray.layouts import Batch, Example, Layout, LogitsMode, Logps
from mint_ray.layouts.batches import pair_tensors
from mint_ray.layouts.concatenated import ConcatenatedLayout
from mint_ray.layouts.lm_head import logit_index, scored_logps
from mint_ray.layouts.shared_prefix import SharedPrefixLayout
from tests.layouts.conformance import check_layout

LAYOUTS: list[Layout] = [
    *(ConcatenatedLayout(logits=logits) for logits in ("chunked", "selected", "all")),
    *(SharedPrefixLayout(logits=logits) for logits in ("chunked", "selected", "all")),
    *(SharedPrefixLayout(max_tokens_per_row=size) for size in (14, 20, 1000)),
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_conforms(layout: Layout) -> None:
    check_layout(layout)


@dataclasses.dataclass(frozen=True)
class LeftPaddedLayout:
    """A new member: one row per completion, padded on the left."""

    logits: LogitsMode = "selected"
    name: ClassVar[str] = "left_padded"

    def collate(self, examples: Sequence[Example], *, score_prompt: bool) -> Batch:
        rows = [example.prompt_ids + completion for example in examples for completion in example.completions]
        width = max(map(len, rows))
        input_ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        positions, targets, prompt_positions, prompt_targets = [], [], [], []
        end = 0
        for example in examples:
            for index, completion in enumerate(example.completions):
                end += width
                positions += range(end - len(completion) - 1, end - 1)
                targets += completion
                if score_prompt and index == 0:
                    start = end - len(completion) - len(example.prompt_ids)
                    prompt_positions += [start + scored - 1 for scored in example.scored_prompt_indices]
                    prompt_targets += [example.prompt_ids[scored] for scored in example.scored_prompt_indices]
        return {
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            **logit_index(positions, targets, prompt_positions, prompt_targets),
            **pair_tensors(examples, score_prompt=score_prompt, num_tokens=int(mask.sum())),
        }

    def compute_logps(self, model: nn.Module, batch: Batch) -> Logps:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        return scored_logps(model, inputs, batch, self.logits)


def test_a_new_layout_conforms() -> None:
    check_layout(LeftPaddedLayout())


class WithoutMask(LeftPaddedLayout):
    """A layout whose tokens attend to padding."""

    def collate(self, examples: Sequence[Example], *, score_prompt: bool) -> Batch:
        batch = super().collate(examples, score_prompt=score_prompt)
        return batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}


def test_a_layout_without_a_mask_does_not_conform() -> None:
    with pytest.raises(AssertionError):
        check_layout(WithoutMask())
