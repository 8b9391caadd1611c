"""Rank the labels of the training records with a student, for samplers that draw from what it gets wrong."""

from __future__ import annotations

from mint_ray import lineage
from mint_ray.artifacts import Artifact
from mint_ray.config.stages import EvaluateResources
from mint_ray.lineage import AnswerRequest
from mint_ray.runtime.student_actors import answer_parts


def rank_labels(root: str, resources: EvaluateResources, request: AnswerRequest, records: Artifact) -> Artifact:
    """Write table `answers` of `Prediction`: all labels of each record, most likely first, with probabilities."""
    artifact = lineage.rank(root, request, records)
    if not artifact.is_complete:
        with artifact.write() as draft:
            answer_parts(artifact, request, resources, records, draft)
    return artifact
