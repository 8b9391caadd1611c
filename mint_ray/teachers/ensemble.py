"""An ensemble of teachers: a weighted mean of their probabilities, whatever their size and the labels they know.

Ensembles of models of different size teach better than one of them: MIND (arXiv 2502.01158). The combination is the
linear opinion pool; weights are learned by maximum likelihood, as EM does for mixture proportions.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.optimize import minimize

from mint_ray.config.loader import UserError
from mint_ray.records import Label, Record, TeacherScores
from mint_ray.teachers import FitReport, Teacher, build_teacher
from mint_ray.teachers.calibration import Floats
from mint_ray.teachers.config import Ensemble
from mint_ray.teachers.inputs import member_names
from mint_ray.teachers.rankings import failed_ranking, rank_labels

logger = logging.getLogger("mint_ray")

MIN_WEIGHT = 1e-6
"""Minimum of a learned weight: a member that answers alone must count, even if it adds nothing to the others."""
MIN_PROBABILITY = 1e-300
"""Minimum probability that a logarithm is computed of."""


class EnsembleTeacher:
    """Teacher whose scores are probabilities that sum to 1 over the task's labels.

    `agreement` of a row is the share of members that rank the same label first.
    """

    def __init__(self, config: Ensemble) -> None:
        self.config = config
        self.members: list[Teacher] = [build_teacher(member.teacher) for member in config.members]
        self.names = member_names(config)
        self.labels: list[str] = []
        self.weights_M = _normalize(np.array([member.weight or 1.0 for member in config.members]))

    def fit(self, labels: Sequence[Label], records: Sequence[Record]) -> FitReport:
        """Fit every member to its labels; with `weights: learned` learn the weights on the validation split.

        Raises:
            UserError: A member names a label that the task lacks, or no validation record can be scored.
        """
        self.labels = [label.label_id for label in labels]
        counts: dict[str, int] = {}
        dropped: dict[str, int] = {}
        for number, (name, member) in enumerate(zip(self.names, self.members, strict=True)):
            wanted = set(self.config.members[number].labels)
            unknown = sorted(wanted.difference(self.labels))
            if unknown:
                raise UserError(
                    f"members.{number}.labels: {unknown[0]!r} is not one of the task's {len(self.labels)} labels"
                )
            report = member.fit([label for label in labels if not wanted or label.label_id in wanted], records)
            counts |= {f"{name}: {key}": count for key, count in report.counts.items()}
            dropped |= {f"{name}: {key}": count for key, count in report.dropped.items()}
        if self.config.weights == "learned":
            probability_RM = self._label_probabilities(records)
            self.weights_M = learn_weights(probability_RM)
            counts["weight_records"] = len(probability_RM)
        weights = zip(self.names, self.weights_M, strict=True)
        logger.info("ensemble: weights %s", ", ".join(f"{name} {weight:.3f}" for name, weight in weights))
        return FitReport(counts=counts, dropped=dropped)

    def save(self, folder: Path) -> None:
        """Write each member to a folder of its own, and labels and weights to `ensemble.json`."""
        for number, member in enumerate(self.members, start=1):
            member_folder = folder / f"member-{number}"
            member_folder.mkdir()
            member.save(member_folder)
        state = {"labels": self.labels, "members": self.names, "weights": self.weights_M.tolist()}
        (folder / "ensemble.json").write_text(json.dumps(state, indent=1))

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        for number, member in enumerate(self.members, start=1):
            member.load(folder / f"member-{number}")
        state = json.loads((folder / "ensemble.json").read_text())
        self.labels, self.weights_M = state["labels"], np.array(state["weights"])

    def score(self, records: Sequence[Record]) -> list[TeacherScores]:
        """Return one ranking per record, in order.

        A member that fails on a record is left out and named in `silent`; a record fails if all members fail.
        """
        by_member = [member.score(records) for member in self.members]
        return [self._combine(record, [rows[i] for rows in by_member]) for i, record in enumerate(records)]

    def _combine(self, record: Record, rows: list[TeacherScores]) -> TeacherScores:
        answered = [m for m, row in enumerate(rows) if row.status == "ok"]
        silent = [f"{self.names[m]}: {row.reason}" for m, row in enumerate(rows) if row.status == "failed"]
        if not answered:
            failed = failed_ranking(record, self.config.kind, "every_member_failed")
            return dataclasses.replace(failed, silent=silent)
        weights_A = _normalize(self.weights_M[answered])  # A members that answered, L labels
        probability_AL = np.stack([self._probabilities(m, rows[m]) for m in answered])
        probability_L = (weights_A[:, None] * probability_AL).sum(axis=0)
        ranking = rank_labels(record, self.config.kind, self.labels, probability_L)
        agreement = sum(rows[m].labels[0] == ranking.labels[0] for m in answered) / len(answered)
        return dataclasses.replace(ranking, agreement=agreement, silent=silent)

    def _probabilities(self, m: int, row: TeacherScores) -> Floats:
        """Return member `m`'s probability of each label: a softmax over those it ranks, 1 / L for each other one.

        The K labels that a member ranks get K / L of the probability together, so that a member for a few labels does
        not outweigh the others on them.
        """
        score_K = np.array(row.scores) / self.config.members[m].temperature
        odds_K = np.exp(score_K - score_K.max())
        ranked = dict(zip(row.labels, odds_K / odds_K.sum() * (len(row.labels) / len(self.labels)), strict=True))
        return np.array([ranked.get(label, 1 / len(self.labels)) for label in self.labels])

    def _label_probabilities(self, records: Sequence[Record]) -> Floats:
        """Return each member's probability of the true label of each validation record; NaN if it failed."""
        index = {label: i for i, label in enumerate(self.labels)}
        validation = [record for record in records if record.split == "validation" and record.label_id in index]
        by_member = [member.score(validation) for member in self.members]
        probability_RM = np.array(
            [
                [
                    self._probabilities(m, rows[r])[index[record.label_id or ""]] if rows[r].status == "ok" else np.nan
                    for m, rows in enumerate(by_member)
                ]
                for r, record in enumerate(validation)
            ]
        ).reshape(len(validation), len(self.members))
        scored_RM: Floats = probability_RM[~np.isnan(probability_RM).all(axis=1)]
        if not len(scored_RM):
            raise UserError(
                "weights: learned requires validation records with a known label that a member can score; found none"
            )
        return scored_RM


def learn_weights(probability_RM: Floats) -> Floats:
    """Return the M weights, which sum to 1, that maximize the likelihood of the true labels of R records.

    `probability_RM` is each member's probability of the true label, NaN if the member failed; the weights of the others
    are then scaled to sum to 1, as in scoring. Sequential least squares programming from equal weights: the same input
    gives the same weights.
    """
    answered_RM = ~np.isnan(probability_RM)
    probability_RM = np.where(answered_RM, probability_RM, 0.0)
    num_members = probability_RM.shape[1]

    def loss(weights_M: Floats) -> tuple[float, Floats]:
        mixture_R, answered_R = probability_RM @ weights_M, answered_RM @ weights_M
        mixture_R = np.maximum(mixture_R, MIN_PROBABILITY)
        gradient_M = (answered_RM / answered_R[:, None] - probability_RM / mixture_R[:, None]).mean(axis=0)
        return float(np.mean(np.log(answered_R) - np.log(mixture_R))), gradient_M

    result = minimize(
        loss,
        np.full(num_members, 1 / num_members),
        jac=True,
        method="SLSQP",
        bounds=[(MIN_WEIGHT, 1.0)] * num_members,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-12, "maxiter": 1000},
    )
    return _normalize(np.clip(result.x, MIN_WEIGHT, 1.0))


def _normalize(weights: Floats) -> Floats:
    normalized: Floats = weights / weights.sum()
    return normalized
