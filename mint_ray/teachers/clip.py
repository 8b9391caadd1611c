"""A CLIP-family model as teacher: zero-shot similarity to the labels' names, or a linear probe on its features."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from scipy.special import log_softmax

from mint_ray.config.loader import UserError
from mint_ray.images import Frame, ImageError, Images, read_images
from mint_ray.records import Label, Record, TeacherScores
from mint_ray.teachers import FitReport
from mint_ray.teachers.calibration import Floats, Indices, fit_temperature, negative_log_likelihood
from mint_ray.teachers.config import Clip
from mint_ray.teachers.linear_probe import apply_probe, choose_probe, fit_probe
from mint_ray.teachers.rankings import failed_ranking, rank_labels
from mint_ray.teachers.templates import render_nonempty
from mint_ray.teachers.two_tower import TwoTowerEncoder

logger = logging.getLogger("mint_ray")

RECORDS_PER_READ = 256
"""Images in memory at a time while the teacher is fitted."""
IMAGE, TEXT = "image", "text"
_WITH_ARTICLE = {IMAGE: "an image", TEXT: "a text"}

Features = dict[str, Floats]
"""Unit vectors of a record's image and text; a modality that the record lacks is left out."""
LabeledFeatures = tuple[Floats, Indices]
"""Features (N, D) of N records and the index of the label of each."""


class ClipTeacher:
    """Teacher whose scores are log-probabilities; those of image and text are averaged with weights.

    Weights are loaded for the first record, so that the driver needs no memory for them.
    """

    def __init__(self, config: Clip) -> None:
        self.config = config
        self.labels: list[Label] = []
        self.temperatures: dict[str, float] = {IMAGE: 1.0, TEXT: 1.0}
        self.probes: dict[str, Floats] = {}

    def fit(self, labels: Sequence[Label], records: Sequence[Record]) -> FitReport:
        """Learn the probes on the training split; choose regularization and temperatures on the validation split.

        Raises:
            UserError: A probe has no training records, or no validation records to choose its regularization on.
        """
        self.labels, self.probes, self.temperatures = list(labels), {}, {IMAGE: 1.0, TEXT: 1.0}
        self.__dict__.pop("_label_features", None)
        counts, dropped = Counter(labels=len(labels)), Counter[str]()
        uses_probe = self.config.mode == "linear_probe"
        splits = {"train"} if uses_probe else set()
        if self.config.calibrate or (uses_probe and self.config.inverse_regularization is None):
            splits.add("validation")
        features = self._extract_features([record for record in records if record.split in splits], dropped)
        for modality in (IMAGE, TEXT):
            if uses_probe:
                self._fit_probe(modality, features, counts)
            if self.config.calibrate and (modality, "validation") in features:
                self._calibrate(modality, *features[modality, "validation"], counts)
        if uses_probe and not self.probes:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted((+dropped).items())) or "none"
            raise UserError(
                f"mode: linear_probe requires labelled training records with an image; there are none among "
                f"{len(records):,} records (dropped: {reasons})"
            )
        return FitReport(counts=dict(counts), dropped=dict(+dropped))

    def save(self, folder: Path) -> None:
        """Write labels and temperatures to `clip.json`, the probes to `probes.safetensors`."""
        state = {
            "labels": [dataclasses.asdict(label) for label in self.labels],
            "temperatures": self.temperatures,
        }
        (folder / "clip.json").write_text(json.dumps(state, ensure_ascii=False, indent=1), encoding="utf-8")
        save_file(self.probes, str(folder / "probes.safetensors"))

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        state = json.loads((folder / "clip.json").read_text(encoding="utf-8"))
        self.labels = [Label(**label) for label in state["labels"]]
        self.temperatures = state["temperatures"]
        self.probes = load_file(str(folder / "probes.safetensors"))
        self.__dict__.pop("_label_features", None)

    def frame(self) -> Frame:
        """Return the form of the model's images. Raises UserError if they are not square."""
        return self._encoder.frame

    def score(self, records: Sequence[Record]) -> list[TeacherScores]:
        """Return one ranking per record, in order; a record without input or with an unreadable image fails."""
        return self.score_images(records, read_images([record.image_uri for record in records], self.frame()))

    def score_images(self, records: Sequence[Record], images: Images) -> list[TeacherScores]:
        """Return one ranking per record, in order, from decoded images."""
        encoded = self._encode(records, images)
        return [self._rank(record, features) for record, features in zip(records, encoded, strict=True)]

    def __getstate__(self) -> dict[str, Any]:
        learned = ("config", "labels", "temperatures", "probes")
        return {name: self.__dict__[name] for name in learned}  # the receiving process loads the weights itself

    def _rank(self, record: Record, features: Features | str) -> TeacherScores:
        if isinstance(features, str):
            return failed_ranking(record, self.config.kind, features)
        weights = {IMAGE: 1 - self.config.text_weight, TEXT: self.config.text_weight}
        logps = {
            modality: log_softmax(self._logits(modality, features_D[None])[0] / self.temperatures[modality])
            for modality, features_D in features.items()
            if self.config.mode == "zero_shot" or modality in self.probes
        }
        if not logps:
            return failed_ranking(record, self.config.kind, "no_input")
        total = sum(weights[modality] for modality in logps)
        mean_L = sum(weights[modality] / total * logps_L for modality, logps_L in logps.items())
        return rank_labels(record, self.config.kind, [label.label_id for label in self.labels], log_softmax(mean_L))

    def _logits(self, modality: str, features_ND: Floats) -> Floats:
        if self.config.mode == "linear_probe":
            return apply_probe(self.probes[modality], features_ND)
        logits_NL: Floats = self._encoder.logit_scale * features_ND @ self._label_features.T
        return logits_NL

    def _extract_features(
        self, records: Sequence[Record], dropped: Counter[str]
    ) -> dict[tuple[str, str], LabeledFeatures]:
        """Return features by modality and split, of the records with a label of the task."""
        index = {label.label_id: i for i, label in enumerate(self.labels)}
        labelled = [record for record in records if record.label_id in index]
        dropped["no_label"] += len(records) - len(labelled)
        rows: dict[tuple[str, str], tuple[list[Floats], list[int]]] = {}
        for start in range(0, len(labelled), RECORDS_PER_READ):
            batch = labelled[start : start + RECORDS_PER_READ]
            images = read_images([record.image_uri for record in batch], self.frame())
            for record, features in zip(batch, self._encode(batch, images), strict=True):
                if isinstance(features, str):
                    dropped[features] += 1
                    continue
                for modality, features_D in features.items():
                    split_features, split_labels = rows.setdefault((modality, record.split), ([], []))
                    split_features.append(features_D)
                    split_labels.append(index[record.label_id or ""])
        return {key: (np.stack(features), np.array(labels)) for key, (features, labels) in rows.items()}

    def _fit_probe(self, modality: str, features: dict[tuple[str, str], LabeledFeatures], counts: Counter[str]) -> None:
        if (modality, "train") not in features:
            return
        features_ND, label_N = features[modality, "train"]
        inverse_regularization = self.config.inverse_regularization
        if inverse_regularization is not None:
            self.probes[modality] = fit_probe(features_ND, label_N, len(self.labels), inverse_regularization)
        elif (modality, "validation") in features:
            validation = features[modality, "validation"]
            self.probes[modality], inverse_regularization = choose_probe(
                features_ND, label_N, *validation, len(self.labels)
            )
        else:
            raise UserError(
                f"mode: linear_probe chooses inverse_regularization on labelled validation records with "
                f"{_WITH_ARTICLE[modality]}; there are none, so set `inverse_regularization`"
            )
        counts[f"{modality}_train_records"] = len(label_N)
        counts[f"{modality}_train_labels"] = len(set(label_N.tolist()))
        logger.info(
            "clip: %s probe fitted on %d records, inverse regularization %g",
            modality, len(label_N), inverse_regularization,
        )  # fmt: skip

    def _calibrate(self, modality: str, features_MD: Floats, label_M: Indices, counts: Counter[str]) -> None:
        if self.config.mode == "linear_probe" and modality not in self.probes:
            return
        logits_ML = self._logits(modality, features_MD)
        self.temperatures[modality] = fit_temperature(logits_ML, label_M)
        counts[f"{modality}_calibration_records"] = len(label_M)
        before, after = (negative_log_likelihood(logits_ML / t, label_M) for t in (1.0, self.temperatures[modality]))
        logger.info(
            "clip: %s temperature %.3f, negative log-likelihood of %d validation records %.3f -> %.3f",
            modality, self.temperatures[modality], len(label_M), before, after,
        )  # fmt: skip

    def _encode(self, records: Sequence[Record], images: Images) -> list[Features | str]:
        """Return the features of each record, or the reason why it has none."""
        template = self.config.text_template
        texts = [None if template is None else render_nonempty(template, record) for record in records]
        encoded: list[Features | str] = []
        image_vectors = self._encoder.encode_images(images)
        text_vectors = self._encoder.encode_texts([text for text in texts if text is not None])
        for image, text in zip(images, texts, strict=True):
            # both are consumed even if the record fails, so that the next record gets its own
            features: Features = {}
            if image is not None and not isinstance(image, ImageError):
                features[IMAGE] = next(image_vectors)
            if text is not None:
                features[TEXT] = next(text_vectors)
            encoded.append(image.reason if isinstance(image, ImageError) else features or "no_input")
        return encoded

    @functools.cached_property
    def _label_features(self) -> Floats:
        """Unit vectors (L, D) of the labels: the normalized mean over name and synonyms in all templates."""
        phrases = [
            [
                template.replace("{}", name)
                for name in (label.name, *label.synonyms)
                for template in self.config.templates
            ]
            for label in self.labels
        ]
        vectors = self._encoder.encode_texts([text for texts in phrases for text in texts])
        means_LD = np.stack([np.mean([next(vectors) for _ in texts], axis=0) for texts in phrases])
        unit_LD: Floats = means_LD / np.linalg.norm(means_LD, axis=1, keepdims=True)
        return unit_LD

    @functools.cached_property
    def _encoder(self) -> TwoTowerEncoder:
        return TwoTowerEncoder(self.config)
