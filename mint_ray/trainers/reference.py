"""What the base student thinks of every completion, worked out once and kept beside the tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import islice

import torch

from mint_ray.layouts import Example, Layout
from mint_ray.layouts.choice import choose_layout
from mint_ray.models.vision_processor import Sight
from mint_ray.students import load_model
from mint_ray.students.config import Student
from mint_ray.trainers.config import Arguments, TrainResources


class Reference:
    """The base student, on the GPU where there is one, computing as the trainer will."""

    def __init__(
        self, student: Student, config: Arguments, resources: TrainResources, sight: Sight | None = None
    ) -> None:
        """`sight` reads the images of the examples, of a few at a time."""
        self.sight = sight
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_model(student).to(self.device)
        self.bf16 = config.bf16
        self.batch_size, self.row_tokens = resources.per_device_eval_batch_size, resources.row_tokens
        self.layout: Layout | None = None

    @torch.no_grad()
    def judge(self, examples: Sequence[Example]) -> list[Example]:
        """The examples with `reference_logps`, each the sum over a completion's tokens, in the same order."""
        judged = []
        for start in range(0, len(examples), self.batch_size):
            batch = examples[start : start + self.batch_size]
            logps = iter(self._sums(batch))
            judged += [
                dataclasses.replace(example, reference_logps=list(islice(logps, len(example.completions))))
                for example in batch
            ]
        return judged

    def _sums(self, examples: Sequence[Example]) -> list[float]:
        if self.sight:
            examples = [self.sight.show(example) for example in examples]
        if self.layout is None:
            if self.sight:
                self.sight.check(self.model, examples[0])
            self.layout = choose_layout(self.model, examples[:1], row_tokens=self.row_tokens)
        batch = self.layout.lay_out(examples, score_prompt=False)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logps = self.layout.run(self.model, {name: tensor.to(self.device) for name, tensor in batch.items()})
        sums: list[float] = logps.sums_C.tolist()
        return sums
