"""Several teachers as one: a weighted mean of their probabilities, whatever their size and the labels they know.

That an ensemble of models of differing size teaches better than one of them: MIND (arXiv 2502.01158). The combination
is the linear opinion pool; weights are learned by maximum likelihood, which is what EM does for mixture proportions.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.optimize import minimize

from mint_ray.config.loader import UserError
from mint_ray.records import Label, Record, TeacherScores
from mint_ray.teachers import FitReport, Teacher, build_teacher
from mint_ray.teachers.config import Ensemble

logger = logging.getLogger("mint_ray")

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

LEAST_WEIGHT = 1e-6
"""Of a learned weight: where a member answers alone, it is to count, however little it does beside others."""
TINY = 1e-300
"""Least probability that a logarithm is taken of."""


class EnsembleTeacher:
    """Scores are probabilities that sum to 1 over the task's labels; `agreement` says how united the members are."""

    def __init__(self, config: Ensemble) -> None:
        self.config = config
        self.members: list[Teacher] = [build_teacher(member.teacher) for member in config.members]
        self.names = [f"{member.teacher.kind} {number}" for number, member in enumerate(config.members, start=1)]
        self.labels: list[str] = []
        self.weights_M = _shares(np.array([member.weight or 1.0 for member in config.members]))

    def inputs(self) -> dict[str, str]:
        return {
            f"{name}: {key}": identity
            for name, member in zip(self.names, self.members, strict=True)
            for key, identity in member.inputs().items()
        }

    def fit(self, labels: Sequence[Label], records: Sequence[Record]) -> FitReport:
        """Fit every member to the labels it is asked for; then, if told so, learn the weights on the validation split.

        Raises UserError for a label that the task lacks, or when no validation record can weigh the members.
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
            truth_RM = self._truth(records)
            self.weights_M = learn_weights(truth_RM)
            counts["records_weighed"] = len(truth_RM)
        told = zip(self.names, self.weights_M, strict=True)
        logger.info("ensemble: weights %s", ", ".join(f"{name} {weight:.3f}" for name, weight in told))
        return FitReport(counts=counts, dropped=dropped)

    def save(self, folder: Path) -> None:
        for number, member in enumerate(self.members, start=1):
            place = folder / f"member-{number}"
            place.mkdir()
            member.save(place)
        state = {"labels": self.labels, "members": self.names, "weights": self.weights_M.tolist()}
        (folder / "ensemble.json").write_text(json.dumps(state, indent=1))

    def load(self, folder: Path) -> None:
        for number, member in enumerate(self.members, start=1):
            member.load(folder / f"member-{number}")
        state = json.loads((folder / "ensemble.json").read_text())
        self.labels, self.weights_M = state["labels"], np.array(state["weights"])

    def score(self, records: Sequence[Record]) -> list[TeacherScores]:
        """A member that fails on a record is left out of it and named in `silent`; a record fails if all of them do."""
        by_member = [member.score(records) for member in self.members]
        return [self._combine(record, [rows[i] for rows in by_member]) for i, record in enumerate(records)]

    def _combine(self, record: Record, rows: list[TeacherScores]) -> TeacherScores:
        heard = [m for m, row in enumerate(rows) if row.status == "ok"]
        silent = [f"{self.names[m]}: {row.reason}" for m, row in enumerate(rows) if row.status == "failed"]
        if not heard:
            return TeacherScores(
                record_id=record.record_id, split=record.split, teacher=self.config.kind,
                labels=[], scores=[], status="failed", reason="every_member_failed", silent=silent,
            )  # fmt: skip
        weights_H = _shares(self.weights_M[heard])  # H members that are heard, L labels
        probability_HL = np.stack([self._probabilities(m, rows[m]) for m in heard])
        probability_L = (weights_H[:, None] * probability_HL).sum(axis=0)
        order = np.argsort(-probability_L, kind="stable")
        ranked = [self.labels[i] for i in order]
        return TeacherScores(
            record_id=record.record_id, split=record.split, teacher=self.config.kind,
            labels=ranked, scores=[float(probability_L[i]) for i in order],
            agreement=sum(rows[m].labels[0] == ranked[0] for m in heard) / len(heard), silent=silent,
        )  # fmt: skip

    def _probabilities(self, m: int, row: TeacherScores) -> Array:
        """What member `m` believes of every label: a softmax over those it ranks, an even share for each it does not.

        A member that knows K of L labels gives K/L to those, so that knowing few makes nobody louder.
        """
        score_K = np.array(row.scores) / self.config.members[m].temperature
        odds_K = np.exp(score_K - score_K.max())
        known = dict(zip(row.labels, odds_K / odds_K.sum() * (len(row.labels) / len(self.labels)), strict=True))
        return np.array([known.get(label, 1 / len(self.labels)) for label in self.labels])

    def _truth(self, records: Sequence[Record]) -> Array:
        """Probability that each member gives to the true label of each validation record; NaN where it is silent."""
        place = {label: i for i, label in enumerate(self.labels)}
        judged = [record for record in records if record.split == "validation" and record.label_id in place]
        by_member = [member.score(judged) for member in self.members]
        truth_RM = np.array(
            [
                [
                    self._probabilities(m, rows[r])[place[record.label_id or ""]] if rows[r].status == "ok" else np.nan
                    for m, rows in enumerate(by_member)
                ]
                for r, record in enumerate(judged)
            ]
        ).reshape(len(judged), len(self.members))
        heard_RM: Array = truth_RM[~np.isnan(truth_RM).all(axis=1)]
        if not len(heard_RM):
            raise UserError(
                "weights: learning them takes validation records with a known label that a member can score; there is "
                "none"
            )
        return heard_RM


def learn_weights(truth_RM: Array) -> Array:
    """The M weights, summing to 1, under which the truths of R records are most likely.

    `truth_RM` holds the probability that each member gives to the true label, NaN where it is silent; the weights of
    those that are heard are then scaled to sum to 1, as in scoring. Sequential least squares from equal weights: the
    same numbers give the same weights.
    """
    heard_RM = ~np.isnan(truth_RM)
    truth_RM = np.where(heard_RM, truth_RM, 0.0)
    members = truth_RM.shape[1]

    def loss(weights_M: Array) -> tuple[float, Array]:
        mixed_R, heard_R = truth_RM @ weights_M, heard_RM @ weights_M
        mixed_R = np.maximum(mixed_R, TINY)
        slope_M = (heard_RM / heard_R[:, None] - truth_RM / mixed_R[:, None]).mean(axis=0)
        return float(np.mean(np.log(heard_R) - np.log(mixed_R))), slope_M

    found = minimize(
        loss,
        np.full(members, 1 / members),
        jac=True,
        method="SLSQP",
        bounds=[(LEAST_WEIGHT, 1.0)] * members,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-12, "maxiter": 1000},
    )
    return _shares(np.clip(found.x, LEAST_WEIGHT, 1.0))


def _shares(weights: Array) -> Array:
    shares: Array = weights / weights.sum()
    return shares
