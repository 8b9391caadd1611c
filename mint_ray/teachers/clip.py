"""A CLIP-family model as teacher: how like an image, or a text, is to the names of the labels, or a probe on what it
sees in them."""

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
from mint_ray.images import Frame, ImageError, Seen, read_images
from mint_ray.models.pretrained import identity_of
from mint_ray.records import Label, Record, TeacherScores
from mint_ray.teachers import FitReport
from mint_ray.teachers.config import Clip
from mint_ray.teachers.generative import write_prompt
from mint_ray.teachers.linear_probe import (
    Array,
    Places,
    apply_probe,
    choose_probe,
    fit_probe,
    fit_temperature,
    likelihood_loss,
)
from mint_ray.teachers.two_tower import TwoTowerEncoder

logger = logging.getLogger("mint_ray")

ROWS_PER_READ = 256
"""Images held at a time while the teacher is fitted."""
IMAGE, TEXT = "image", "text"
_ARTICLE = {IMAGE: "an image", TEXT: "a text"}

Features = dict[str, Array]
"""What the model makes of a record's image and of its text, each of norm 1; what the record lacks is left out."""


class ClipTeacher:
    """Scores are log-probabilities. What the image says and what the text says are weighed where there are both.

    Weights are read when the first record is asked about, so that whoever holds the teacher need not hold them.
    """

    def __init__(self, config: Clip) -> None:
        self.config = config
        self.labels: list[Label] = []
        self.temperatures: dict[str, float] = {IMAGE: 1.0, TEXT: 1.0}
        self.probes: dict[str, Array] = {}

    def inputs(self) -> dict[str, str]:
        return {"model": identity_of(self.config.model_id, self.config.revision)}

    def fit(self, labels: Sequence[Label], records: Sequence[Record]) -> FitReport:
        """Learn the probes on the training split; choose their C and the temperatures on the validation split.

        Raises UserError if a probe has no training record to learn from, or no validation record to choose its C on.
        """
        self.labels, self.probes, self.temperatures = list(labels), {}, {IMAGE: 1.0, TEXT: 1.0}
        self.__dict__.pop("_names_LD", None)
        counts, dropped = Counter(labels=len(labels)), Counter[str]()
        probing = self.config.mode == "linear_probe"
        wanted = {"train"} if probing else set()
        if self.config.calibrate or (probing and self.config.c is None):
            wanted.add("validation")
        judged = self._gather([record for record in records if record.split in wanted], dropped)
        for sense in (IMAGE, TEXT):
            if probing:
                self._learn(sense, judged, counts)
            if self.config.calibrate and (sense, "validation") in judged:
                self._calibrate(sense, *judged[sense, "validation"], counts)
        if probing and not self.probes:
            left_out = ", ".join(f"{reason} {count:,}" for reason, count in sorted((+dropped).items())) or "none"
            raise UserError(
                f"mode: linear_probe learns from labelled training records with an image; of {len(records):,} records "
                f"there is none (left out: {left_out})"
            )
        return FitReport(counts=dict(counts), dropped=dict(+dropped))

    def save(self, folder: Path) -> None:
        state = {
            "labels": [dataclasses.asdict(label) for label in self.labels],
            "temperatures": self.temperatures,
        }
        (folder / "clip.json").write_text(json.dumps(state, ensure_ascii=False, indent=1), encoding="utf-8")
        save_file(self.probes, str(folder / "probes.safetensors"))

    def load(self, folder: Path) -> None:
        state = json.loads((folder / "clip.json").read_text(encoding="utf-8"))
        self.labels = [Label(**label) for label in state["labels"]]
        self.temperatures = state["temperatures"]
        self.probes = load_file(str(folder / "probes.safetensors"))
        self.__dict__.pop("_names_LD", None)

    def frame(self) -> Frame:
        return self._towers.frame

    def score(self, records: Sequence[Record]) -> list[TeacherScores]:
        return self.score_seen(records, read_images([record.image_uri for record in records], self.frame()))

    def score_seen(self, records: Sequence[Record], images: Seen) -> list[TeacherScores]:
        perceived = self._perceive(records, images)
        return [self._rank(record, found) for record, found in zip(records, perceived, strict=True)]

    def __getstate__(self) -> dict[str, Any]:
        learned = ("config", "labels", "temperatures", "probes")
        return {name: self.__dict__[name] for name in learned}  # weights are read again where it arrives

    def _rank(self, record: Record, found: Features | str) -> TeacherScores:
        if isinstance(found, str):
            return self._failed(record, found)
        weights = {IMAGE: 1 - self.config.text_weight, TEXT: self.config.text_weight}
        said = {
            sense: log_softmax(self._logits(sense, features_D[None])[0] / self.temperatures[sense])
            for sense, features_D in found.items()
            if self.config.mode == "zero_shot" or sense in self.probes
        }
        if not said:
            return self._failed(record, "nothing_to_see")
        total = sum(weights[sense] for sense in said)
        pooled_L = sum(weights[sense] / total * logps_L for sense, logps_L in said.items())
        logps_L = log_softmax(pooled_L)
        order = np.argsort(-logps_L, kind="stable")
        return TeacherScores(
            record_id=record.record_id, split=record.split, teacher=self.config.kind,
            labels=[self.labels[i].label_id for i in order], scores=[float(logps_L[i]) for i in order],
        )  # fmt: skip

    def _failed(self, record: Record, reason: str) -> TeacherScores:
        return TeacherScores(
            record_id=record.record_id, split=record.split, teacher=self.config.kind,
            labels=[], scores=[], status="failed", reason=reason,
        )  # fmt: skip

    def _logits(self, sense: str, features_ND: Array) -> Array:
        if self.config.mode == "linear_probe":
            return apply_probe(self.probes[sense], features_ND)
        logits_NL: Array = self._towers.scale * features_ND @ self._names_LD.T
        return logits_NL

    def _gather(self, records: Sequence[Record], dropped: Counter[str]) -> dict[tuple[str, str], tuple[Array, Places]]:
        """Features and labels by sense and split, of the records with a known label that can be perceived."""
        place = {label.label_id: i for i, label in enumerate(self.labels)}
        known = [record for record in records if record.label_id in place]
        dropped["no_label"] += len(records) - len(known)
        rows: dict[tuple[str, str], tuple[list[Array], list[int]]] = {}
        for start in range(0, len(known), ROWS_PER_READ):
            some = known[start : start + ROWS_PER_READ]
            images = read_images([record.image_uri for record in some], self.frame())
            for record, found in zip(some, self._perceive(some, images), strict=True):
                if isinstance(found, str):
                    dropped[found] += 1
                    continue
                for sense, features_D in found.items():
                    features, truths = rows.setdefault((sense, record.split), ([], []))
                    features.append(features_D)
                    truths.append(place[record.label_id or ""])
        return {key: (np.stack(features), np.array(truths)) for key, (features, truths) in rows.items()}

    def _learn(self, sense: str, judged: dict[tuple[str, str], tuple[Array, Places]], counts: Counter[str]) -> None:
        if (sense, "train") not in judged:
            return
        features_ND, truth_N = judged[sense, "train"]
        c = self.config.c
        if c is not None:
            self.probes[sense] = fit_probe(features_ND, truth_N, len(self.labels), c)
        elif (sense, "validation") in judged:
            validation = judged[sense, "validation"]
            self.probes[sense], c = choose_probe(features_ND, truth_N, *validation, len(self.labels))
        else:
            raise UserError(
                f"mode: linear_probe chooses C on labelled validation records with {_ARTICLE[sense]}; there is none, "
                "so give `c`"
            )
        counts[f"{sense}_records_learned"] = len(truth_N)
        counts[f"{sense}_labels_learned"] = len(set(truth_N.tolist()))
        logger.info("clip: probe of the %s on %d records, C %g", sense, len(truth_N), c)

    def _calibrate(self, sense: str, features_MD: Array, truth_M: Places, counts: Counter[str]) -> None:
        if self.config.mode == "linear_probe" and sense not in self.probes:
            return
        logits_ML = self._logits(sense, features_MD)
        self.temperatures[sense] = fit_temperature(logits_ML, truth_M)
        counts[f"{sense}_records_calibrated"] = len(truth_M)
        before, after = (likelihood_loss(logits_ML / t, truth_M) for t in (1.0, self.temperatures[sense]))
        logger.info(
            "clip: temperature of the %s %.3f, mean negative log-likelihood of %d validation records %.3f -> %.3f",
            sense, self.temperatures[sense], len(truth_M), before, after,
        )  # fmt: skip

    def _perceive(self, records: Sequence[Record], images: Seen) -> list[Features | str]:
        """The features of each record, or why it has none."""
        template = self.config.text_template
        texts = [None if template is None else write_prompt(template, record) for record in records]
        found: list[Features | str] = []
        looks = self._towers.look(images)
        reads = self._towers.read([text for text in texts if text is not None])
        for image, text in zip(images, texts, strict=True):
            # both are taken in any case, so that the next record gets its own
            features: Features = {}
            if image is not None and not isinstance(image, ImageError):
                features[IMAGE] = next(looks)
            if text is not None:
                features[TEXT] = next(reads)
            found.append(image.reason if isinstance(image, ImageError) else features or "nothing_to_see")
        return found

    @functools.cached_property
    def _names_LD(self) -> Array:
        """Of each label the mean of its names and synonyms in all templates, of norm 1."""
        phrases = [
            [
                template.replace("{}", name)
                for name in (label.name, *label.synonyms)
                for template in self.config.templates
            ]
            for label in self.labels
        ]
        vectors = self._towers.read([text for texts in phrases for text in texts])
        means_LD = np.stack([np.mean([next(vectors) for _ in texts], axis=0) for texts in phrases])
        unit_LD: Array = means_LD / np.linalg.norm(means_LD, axis=1, keepdims=True)
        return unit_LD

    @functools.cached_property
    def _towers(self) -> TwoTowerEncoder:
        return TwoTowerEncoder(self.config)
