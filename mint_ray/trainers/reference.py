"""The reference model: log-probabilities of completions under the base student, computed once and stored as tokens are.

Tested by tests/trainers/test_reference.py and tests/trainers/test_vision.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import islice

import torch

from mint_ray.layouts import Example, Layout
from mint_ray.layouts.choice import choose_layout
from mint_ray.models.vision_processor import VisionProcessor
from mint_ray.students.config import Student
from mint_ray.students.loading import load_model
from mint_ray.trainers.config import TrainerArguments, TrainResources


class ReferenceModel:
    """The base student, on the GPU if there is one, in the precision of the trainer."""

    def __init__(
        self,
        student: Student,
        config: TrainerArguments,
        resources: TrainResources,
        vision_processor: VisionProcessor | None = None,
    ) -> None:
        """Load the model; `vision_processor` is needed for examples with images."""
        self.vision_processor = vision_processor
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_model(student).to(self.device)
        self.bf16 = config.bf16
        self.batch_size, self.max_tokens_per_row = resources.per_device_eval_batch_size, resources.max_tokens_per_row
        self.layout: Layout | None = None

    @torch.no_grad()
    def add_reference_logps(self, examples: Sequence[Example]) -> list[Example]:
        """Return the examples with `reference_logps`, summed over the tokens of each completion, in the same order."""
        added = []
        for start in range(0, len(examples), self.batch_size):
            batch = examples[start : start + self.batch_size]
            logps = iter(self._sums(batch))
            added += [
                dataclasses.replace(example, reference_logps=list(islice(logps, len(example.completions))))
                for example in batch
            ]
        return added

    def _sums(self, examples: Sequence[Example]) -> list[float]:
        if self.vision_processor:
            examples = [self.vision_processor.add_image(example) for example in examples]
        if self.layout is None:
            if self.vision_processor:
                self.vision_processor.check_features(self.model, examples[0])
            self.layout = choose_layout(self.model, examples[:1], max_tokens_per_row=self.max_tokens_per_row)
        batch = self.layout.collate(examples, score_prompt=False)
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logps = self.layout.compute_logps(self.model, batch)
        sums: list[float] = logps.sums.tolist()
        return sums
