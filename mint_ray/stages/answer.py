"""Answer the held-out records with one student, by one method."""

from __future__ import annotations

from mint_ray import lineage
from mint_ray.artifacts import Artifact
from mint_ray.config.stages import EvaluateResources
from mint_ray.lineage import AnswerRequest
from mint_ray.runtime.student_actors import answer_parts


def answer_records(root: str, resources: EvaluateResources, request: AnswerRequest, records: Artifact) -> Artifact:
    """Write table `answers` of `Prediction`, one row per record of the request's splits.

    Of a ranking, each row has all labels, most likely first, and their probabilities. Raises UserError, before any
    work, for a label that a constrained answer cannot name.
    """
    artifact = lineage.answer(root, request, records)
    if not artifact.is_complete:
        with artifact.write() as draft:
            answer_parts(artifact, request, resources, records, draft)
    return artifact
