"""An image teacher as a user might write one: labels are ranked by the mean of the image's color channels."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mint_ray.images import Frame, ImageError, Images, read_images
from mint_ray.records import Label, Record, TeacherScores
from mint_ray.teachers import FitReport


class ColorTeacher:
    """Teacher for three labels: red, green and blue, in this order.

    `size` is that of its frame; 0 excludes images. `seconds` is the time that it takes for one image.
    """

    def __init__(self, size: int = 8, seconds: float = 0.0) -> None:
        self.size, self.seconds = size, seconds

    def inputs(self) -> dict[str, str]:
        return {}

    def frame(self) -> Frame | None:
        return Frame(size=self.size) if self.size else None

    def fit(self, labels: Sequence[Label], records: Sequence[Record]) -> FitReport:
        self.labels = [label.label_id for label in labels]
        return FitReport()

    def save(self, folder: Path) -> None:
        (folder / "labels.json").write_text(json.dumps(self.labels))

    def load(self, folder: Path) -> None:
        self.labels = json.loads((folder / "labels.json").read_text())

    def score(self, records: Sequence[Record]) -> list[TeacherScores]:
        return self.score_images(
            records, read_images([record.image_uri for record in records], self.frame() or Frame(size=8))
        )

    def score_images(self, records: Sequence[Record], images: Images) -> list[TeacherScores]:
        return [self._score(record, image) for record, image in zip(records, images, strict=True)]

    def _score(self, record: Record, image: np.ndarray | ImageError | None) -> TeacherScores:
        time.sleep(self.seconds)
        if image is None or isinstance(image, ImageError):
            return TeacherScores(
                record_id=record.record_id, split=record.split, teacher="colors", labels=[], scores=[],
                status="failed", reason="no_image" if image is None else image.reason,
            )  # fmt: skip
        means = dict(zip(self.labels, image.mean(axis=(0, 1)).tolist(), strict=True))
        labels = sorted(self.labels, key=lambda label: -means[label])
        return TeacherScores(
            record_id=record.record_id, split=record.split, teacher="colors",
            labels=labels, scores=[means[label] for label in labels],
        )  # fmt: skip
