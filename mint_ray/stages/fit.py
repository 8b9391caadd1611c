"""Make the teacher ready: train it, or gather what it knows, from everything that is not held out."""

from __future__ import annotations

import logging

from mint_ray.artifacts import Artifact, open_artifact
from mint_ray.loading import dump
from mint_ray.records import Label, Record
from mint_ray.stages.config import Fit
from mint_ray.teachers import build_teacher

logger = logging.getLogger("mint_ray")

FOLDER = "teacher"


def fit_teacher(root: str, config: Fit, records: Artifact) -> Artifact:
    """Folder `teacher`, as the teacher saved it; the manifest holds its settings."""
    teacher = build_teacher(config.teacher)
    artifact = open_artifact(root, "fit", {"fit": dump(config)}, {"records": records.name, **teacher.inputs()})
    if artifact.is_complete:
        return artifact
    with artifact.write() as draft:
        report = teacher.fit(records.rows(Label, "labels"), records.rows(Record, "records"))
        (draft.folder / FOLDER).mkdir()
        teacher.save(draft.folder / FOLDER)
        draft.counts.update(report.counts)
        draft.dropped.update(report.dropped)
    logger.info("fit: %s, %s", config.teacher.kind, ", ".join(f"{k} {v:,}" for k, v in draft.counts.items()))
    return artifact
