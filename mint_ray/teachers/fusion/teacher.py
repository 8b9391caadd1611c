"""The fusion teacher: fitting, saving, loading and scoring."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.special import log_softmax

from mint_ray.images import Frame, ImageError, Images, read_images
from mint_ray.records import Label, Record, TeacherScores
from mint_ray.teachers import Checkpointer, FitReport
from mint_ray.teachers.calibration import Floats
from mint_ray.teachers.config import Fusion
from mint_ray.teachers.fusion.distributed import device
from mint_ray.teachers.fusion.encoders import load_preprocessor
from mint_ray.teachers.fusion.features import ModalityEncoders
from mint_ray.teachers.fusion.network import FusionHead
from mint_ray.teachers.fusion.tabular import FieldsEncoder, PhenotypeEncoder
from mint_ray.teachers.fusion.training import load_weights, train, trained_weights
from mint_ray.teachers.rankings import failed_ranking, rank_labels

WEIGHTS, STATE = "weights.safetensors", "fusion.json"
ROWS_PER_PASS = 64
"""Rows in one pass of the head; a pass is always padded to this size."""
SCORE_DECIMALS = 5
"""Decimals of a score; further ones can depend on the batch."""


def build_fusion(config: Fusion) -> FusionTeacher:
    """Return the teacher; an `ImageTeacher` if it reads images."""
    return FusionImageTeacher(config) if config.image or config.joint else FusionTeacher(config)


class FusionTeacher:
    """Teacher whose scores are calibrated log-probabilities.

    A record fails if it has none of the modalities, or an image that cannot be read.
    """

    def __init__(self, config: Fusion) -> None:
        self.config = config
        self.labels: list[str] = []
        self.temperature = 1.0
        self._encoders: ModalityEncoders | None = None
        self._head: FusionHead | None = None

    def fit(self, labels: Sequence[Label], records: Sequence[Record]) -> FitReport:
        """Train in this process, without checkpoints. Raises UserError as `training.train` does."""
        return self._fit(labels, records, None)

    def train(self, labels: Sequence[Label], records: Sequence[Record], checkpointer: Checkpointer) -> FitReport:
        """Train in all processes of torch.distributed, with checkpoints. Raises UserError as `fit` does."""
        return self._fit(labels, records, checkpointer)

    def save(self, folder: Path) -> None:
        """Write trained weights to `weights.safetensors`, everything else to `fusion.json`."""
        encoders, head = self._fitted()
        state = {
            "labels": self.labels,
            "temperature": self.temperature,
            "feature_sizes": {modality: encoders.feature_size(modality) for modality in encoders.names},
            "fields": None if encoders.fields is None else encoders.fields.to_json(),
            "phenotypes": None if encoders.phenotypes is None else encoders.phenotypes.to_json(),
        }
        (folder / STATE).write_text(json.dumps(state, indent=1, ensure_ascii=False), encoding="utf-8")
        weights = trained_weights(encoders, head)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, and the published weights of the encoders."""
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        self.labels, self.temperature = state["labels"], state["temperature"]
        fields = None if state["fields"] is None else FieldsEncoder.from_json(state["fields"])
        phenotypes = None if state["phenotypes"] is None else PhenotypeEncoder.from_json(state["phenotypes"])
        encoders = ModalityEncoders(self.config, fields, phenotypes)
        head = FusionHead(self.config, state["feature_sizes"], len(self.labels))
        load_weights(encoders, head, load_file(folder / WEIGHTS))
        self._encoders, self._head = encoders.to(device()), head.to(device()).eval()

    def score(self, records: Sequence[Record]) -> list[TeacherScores]:
        """Return one ranking per record, in order."""
        return self._score(records, [None] * len(records))

    def __getstate__(self) -> dict[str, Any]:
        # settings and the files of `save`: the receiving process loads the published weights itself
        files = {}
        if self._encoders is not None:
            with tempfile.TemporaryDirectory() as folder:
                self.save(Path(folder))
                files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        return {"config": self.config, "files": files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["config"])  # type: ignore[misc]
        if state["files"]:
            with tempfile.TemporaryDirectory() as folder:
                for name, content in state["files"].items():
                    (Path(folder) / name).write_bytes(content)
                self.load(Path(folder))

    def _fit(self, labels: Sequence[Label], records: Sequence[Record], checkpointer: Checkpointer | None) -> FitReport:
        result = train(self.config, labels, records, checkpointer)
        self.labels = [label.label_id for label in labels]
        self.temperature = result.temperature
        self._encoders, self._head = result.encoders, result.head.eval()
        return result.report

    def _fitted(self) -> tuple[ModalityEncoders, FusionHead]:
        if self._encoders is None or self._head is None:
            raise RuntimeError("the fusion teacher must be fitted or loaded first")
        return self._encoders, self._head

    def _score(self, records: Sequence[Record], images: Images) -> list[TeacherScores]:
        encoders, _ = self._fitted()
        inputs = encoders.read_records(records)
        reasons: list[str | None] = []
        for row, image in enumerate(images):
            is_empty = not any(bool(mask[row]) for mask in inputs.present.values())
            reasons.append(image.reason if isinstance(image, ImageError) else "no_input" if is_empty else None)
        rows = [row for row, reason in enumerate(reasons) if reason is None]
        with torch.inference_mode():
            features = {
                modality: encoders.encode(modality, inputs, rows, [images[row] for row in rows])
                for modality in encoders.names
            }
            present = {modality: inputs.present[modality][rows].to(device()) for modality in encoders.names}
            logits_NL = self._logits(features, present)
        scores = dict(zip(rows, log_softmax(logits_NL / self.temperature, axis=1), strict=True))
        return [
            rank_labels(record, self.config.kind, self.labels, np.round(scores[row], SCORE_DECIMALS))
            if reason is None
            else failed_ranking(record, self.config.kind, reason)
            for row, (record, reason) in enumerate(zip(records, reasons, strict=True))
        ]

    def _logits(self, features: dict[str, torch.Tensor], present: dict[str, torch.Tensor]) -> Floats:
        """Return logits (N, labels), computed in passes of one size."""
        _, head = self._fitted()
        num_rows = len(next(iter(present.values())))
        passes = [np.zeros((0, len(self.labels)))]
        for start in range(0, num_rows, ROWS_PER_PASS):
            rows = [min(start + k, num_rows - 1) for k in range(ROWS_PER_PASS)]
            batch = {modality: tensor[rows] for modality, tensor in features.items()}
            logits = head(batch, {modality: mask[rows] for modality, mask in present.items()}, None)
            passes.append(logits[: num_rows - start].double().cpu().numpy())
        return np.concatenate(passes)


class FusionImageTeacher(FusionTeacher):
    """Fusion teacher that reads images, alone or with other modalities."""

    def frame(self) -> Frame:
        """Return the form of the image encoder's images."""
        config = self.config.image or self.config.joint
        if config is None:
            raise ValueError("these settings have no image encoder")
        return load_preprocessor(config).frame

    def score(self, records: Sequence[Record]) -> list[TeacherScores]:
        """Return one ranking per record, in order."""
        return self._score(records, read_images([record.image_uri for record in records], self.frame()))

    def score_images(self, records: Sequence[Record], images: Images) -> list[TeacherScores]:
        """Return one ranking per record, in order, from decoded images."""
        return self._score(records, images)
