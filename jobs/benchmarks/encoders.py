"""A teacher for score.py: a vision encoder with random weights, whose scores are noise and whose cost is realistic."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import ViTConfig, ViTModel

from mint_ray.images import Frame, Images, read_images
from mint_ray.records import Label, Record, TeacherScores
from mint_ray.teachers import FitReport

SIZES = {
    "tiny": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    "small": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    "base": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}
"""Sizes of a ViT with patches of 16 pixels and 12 layers."""


class RandomEncoder:
    """A ViT and a linear layer on its first token, on the GPU if there is one."""

    def __init__(self, model: str = "tiny", size: int = 224, threads: int = 1) -> None:
        self.model, self.size, self.threads = model, size, threads
        self.labels: list[str] = []
        self.encoder: Any = None

    def inputs(self) -> dict[str, str]:
        """Return nothing: the teacher reads no files."""
        return {}

    def frame(self) -> Frame:
        """Return the size of the images."""
        return Frame(size=self.size)

    def fit(self, labels: Sequence[Label], records: Sequence[Record]) -> FitReport:
        """Keep the ids of the labels."""
        self.labels = [label.label_id for label in labels]
        return FitReport()

    def save(self, folder: Path) -> None:
        """Write the ids of the labels."""
        (folder / "labels.json").write_text(json.dumps(self.labels))

    def load(self, folder: Path) -> None:
        """Read the ids of the labels, and create the encoder with random weights."""
        self.labels = json.loads((folder / "labels.json").read_text())
        torch.set_num_threads(self.threads)
        torch.manual_seed(0)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        config = ViTConfig(image_size=self.size, **SIZES[self.model])
        self.encoder = ViTModel(config, add_pooling_layer=False).eval().to(self.device)
        self.head = torch.nn.Linear(config.hidden_size, len(self.labels)).to(self.device)

    def score(self, records: Sequence[Record]) -> list[TeacherScores]:
        """Read and score the images of the records."""
        return self.score_images(records, read_images([record.image_uri for record in records], self.frame()))

    @torch.inference_mode()
    def score_images(self, records: Sequence[Record], images: Images) -> list[TeacherScores]:
        """Score decoded images."""
        pixels = torch.from_numpy(np.stack([image for image in images if isinstance(image, np.ndarray)]))
        pixels_BCHW = pixels.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        logits_BL = self.head(self.encoder(pixel_values=pixels_BCHW).last_hidden_state[:, 0])
        scores_BL, order_BL = logits_BL.log_softmax(-1).sort(descending=True)
        return [
            TeacherScores(
                record_id=record.record_id, split=record.split, teacher="random",
                labels=[self.labels[place] for place in order], scores=scores,
            )
            for record, order, scores in zip(records, order_BL.tolist(), scores_BL.tolist(), strict=True)
        ]  # fmt: skip
