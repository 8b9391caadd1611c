"""Fuse one vector for each part of a record, any of which may be missing, into a logit for each label."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

from mint_ray.teachers.config import Fusion

Tensor = torch.Tensor

HEADS = 4
TINY = 1e-4
"""Least deviation that a number is divided by: one that hardly ever moved is not blown up."""


class Head(nn.Module):
    """P parts (B, width of the part) to (B, labels).

    Each part gives logits of its own, and so do the parts together: the sum is at least as good as linear models of
    the parts, which few records can already teach, and knows what only several parts tell together.
    """

    def __init__(self, config: Fusion, widths: Mapping[str, int], labels: int) -> None:
        super().__init__()
        width = config.width
        self.fusion, self.parts = config.fusion, list(widths)
        for part, size in widths.items():
            self.register_buffer(f"mean_{part}", torch.zeros(size))
            self.register_buffer(f"deviation_{part}", torch.ones(size))
        self.project = nn.ModuleDict({part: nn.Linear(size, width) for part, size in widths.items()})
        self.alone = nn.ModuleDict({part: nn.Linear(size, labels, bias=False) for part, size in widths.items()})
        for weight in self.alone.parameters():
            nn.init.zeros_(weight)
        # what stands for a part that is not there
        self.missing = nn.ParameterDict({part: nn.Parameter(torch.zeros(width)) for part in widths})
        if config.fusion == "concat":
            self.mix = nn.Linear(width * len(widths), width)
        if config.fusion == "gated":
            self.gate = nn.ModuleDict({part: nn.Linear(width, 1) for part in widths})
        if config.fusion == "attention":
            self.question = nn.Parameter(torch.randn(width) * 0.02)
            self.names = nn.ParameterDict({part: nn.Parameter(torch.randn(width) * 0.02) for part in widths})
            self.attention = nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.last = nn.Linear(width, labels)

    def scale(self, part: str, mean: Tensor, deviation: Tensor) -> None:
        """Remember how the numbers of a part are spread over the training split."""
        self.get_buffer(f"mean_{part}").copy_(mean)
        self.get_buffer(f"deviation_{part}").copy_(deviation.clamp(min=TINY))

    def forward(self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor], dropped: Tensor | None) -> Tensor:
        """`present` says for each part which of the B records have it; `dropped` (B, width) multiplies what is fused:
        0 or 1 / (1 - dropout) while it learns, None afterwards."""
        projected, logits = [], []
        for part in self.parts:
            scaled = (inputs[part] - self.get_buffer(f"mean_{part}")) / self.get_buffer(f"deviation_{part}")
            there = present[part][:, None]
            projected.append(torch.where(there, self.project[part](scaled), self.missing[part]))
            # torch.where and not a product: what a missing part holds may be anything
            logits.append(torch.where(there, self.alone[part](scaled), 0.0))
        fused = functional.gelu(self._fuse(projected))
        if dropped is not None:
            fused = fused * dropped
        out: Tensor = self.last(fused) + sum(logits)
        return out

    def _fuse(self, projected: list[Tensor]) -> Tensor:
        if self.fusion == "concat":
            mixed: Tensor = self.mix(torch.cat(projected, dim=1))
            return mixed
        parts_BPW = torch.stack(projected, dim=1)  # B records, P parts, W numbers
        if self.fusion == "gated":
            weight_BP = torch.cat(
                [self.gate[part](value) for part, value in zip(self.parts, projected, strict=True)], dim=1
            ).softmax(dim=1)
            mean: Tensor = (weight_BP[:, :, None] * parts_BPW).sum(dim=1)
            return mean
        named_BPW = parts_BPW + torch.stack([self.names[part] for part in self.parts])
        question_B1W = self.question.expand(len(parts_BPW), 1, -1)
        answer_B1W = self.attention(question_B1W, named_BPW, named_BPW, need_weights=False)[0]
        answer: Tensor = answer_B1W[:, 0] + parts_BPW.mean(dim=1)
        return answer
