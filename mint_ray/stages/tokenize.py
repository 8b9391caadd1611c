"""Tokenize the pairs, once for all trainings that read the same tokens."""

from __future__ import annotations

import dataclasses
import functools
import logging
from itertools import pairwise
from typing import Any

import torch

from mint_ray import lineage
from mint_ray.artifacts import Artifact, PartResult, read_part
from mint_ray.config.loader import UserError
from mint_ray.config.stages import Train
from mint_ray.lineage import resolve_student
from mint_ray.models.vision_processor import VisionProcessor
from mint_ray.records import PreferencePair, TokenizedRecord, from_table
from mint_ray.runtime.map_parts import Part, Workers, map_parts
from mint_ray.students.config import Student
from mint_ray.students.loading import load_tokenizer, load_vision_processor
from mint_ray.telemetry import Progress, record_failed_rows
from mint_ray.trainers.examples import to_row
from mint_ray.trainers.reference import ReferenceModel
from mint_ray.trainers.tokenization import tokenize_pairs as to_tokens

logger = logging.getLogger("mint_ray")

ROWS_PER_PART = 1_024
"""Maximum number of records per part of the output; a training worker has a few parts in memory at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PairsPart(Part):
    """One part of the pairs: the work of one task; `path` is that of the pairs, as several parts may be written."""

    table: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokensPart(PartResult):
    """The tokens of one part of the pairs, as the driver sees them."""

    table: str
    first_id: str | None
    """Record of the first row; None for an empty part."""
    last_id: str | None
    """Record of the last row."""
    longest: int
    """Tokens of the longest record, before truncation."""
    longest_id: str


def tokenize_pairs(root: str, config: Train, pairs: Artifact, built: Artifact | None = None) -> Artifact:
    """Write tables `train` and `validation` of `TokenizedRecord`, part by part on the workers.

    For an objective with a reference model, the rows have each completion's log-probability under the base student.
    `built` is the output of `build_vlm` with the student, if it was built. Raises UserError if no training record
    is left, and if the pairs of a record are in two parts.
    """
    artifact = lineage.tokenize(root, config, pairs, built)
    if artifact.is_complete:
        return artifact
    with artifact.write() as draft:
        parts = _tokenize(artifact, config, pairs, built)
        for part in parts:
            draft.add_part(part)
        if not draft.counts["records_train"]:
            longest, record_id = max((part.longest, part.longest_id) for part in parts)
            if not longest:
                reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(draft.dropped.items())) or "none"
                raise UserError(f"{pairs.uri}: no training record is left; dropped: {reasons}")
            raise UserError(
                f"train.trainer.max_length: no training record has {config.trainer.max_length} tokens or fewer; the "
                f"longest, {record_id!r}, has {longest:,}"
            )
        _check_parts(parts, pairs)
    logger.info("tokenize: %s", ", ".join(f"{name} {count:,}" for name, count in draft.counts.items()))
    return artifact


class TokenizingWorker:
    """Worker that tokenizes one part of the pairs at a time; a reference model needs the base student, too."""

    def __init__(self, artifact: Artifact, config: Train, student: Student) -> None:
        self.artifact = artifact
        self.trainer = config.trainer
        self.tokenizer, self.vision_processor = _load_tokenizer(student, artifact.inputs["student"])
        self.reference: ReferenceModel | None = None
        if config.trainer.objective.uses_reference:
            torch.set_num_threads(max(1, int(config.resources.cpus_per_worker)))
            self.reference = ReferenceModel(student, config.trainer, config.resources, self.vision_processor)

    def work(self, part: PairsPart) -> TokensPart:
        """Tokenize and write one part."""
        rows = from_table(PreferencePair, read_part(part.uri))
        trainer = self.trainer
        examples, stats = to_tokens(rows, self.tokenizer, trainer.max_length, trainer.overlong, self.vision_processor)
        if self.reference is not None:
            examples = self.reference.add_reference_logps(examples)
        name = part.path.removesuffix(".parquet")
        # an empty part is written too, so that the table exists
        files = [
            self.artifact.write_part(
                f"{name}-{number:03d}.parquet",
                TokenizedRecord,
                [to_row(example) for example in examples[start : start + ROWS_PER_PART]],
            )
            for number, start in enumerate(range(0, max(1, len(examples)), ROWS_PER_PART))
        ]
        record_failed_rows("tokenize", self.artifact.name, stats.dropped)
        counts = {
            "records": len({example.record_id for example in examples}),
            "pairs": sum(len(example.pairs) for example in examples),
            "tokens": sum(len(example.prompt_ids) + sum(map(len, example.completions)) for example in examples),
            "truncated": stats.truncated,
        }
        return TokensPart(
            table=part.table,
            path=part.path,
            rows=len(rows),
            first_id=rows[0].record_id if rows else None,
            last_id=rows[-1].record_id if rows else None,
            files=files,
            counts={f"{name}_{part.table}": count for name, count in counts.items()},
            dropped=dict(stats.dropped),
            longest=stats.longest[0],
            longest_id=stats.longest[1],
        )


def _tokenize(artifact: Artifact, config: Train, pairs: Artifact, built: Artifact | None) -> list[TokensPart]:
    files = [(table, file) for table in ("train", "validation") for file in pairs.table_files(table)]
    parts = [PairsPart(table=table, path=file.path, uri=pairs.file_uri(file.path)) for table, file in files]
    progress = Progress("tokenize", sum(file.rows or 0 for _, file in files), "pairs")
    resources = config.resources
    actors, cpus, gpus = None, 1.0, 0.0
    if config.trainer.objective.uses_reference:
        # actors, because the base student takes long to load; as many as there are training workers later
        actors = (1, resources.worker_range[1])
        cpus, gpus = resources.cpus_per_worker, resources.gpus_per_worker
    arguments = (artifact, config, resolve_student(config.student, built))
    workers = Workers(worker=TokenizingWorker, arguments=arguments, actors=actors, cpus=cpus, gpus=gpus)
    tokenized: list[TokensPart] = []
    for part in map_parts(artifact, parts, TokensPart, workers):
        progress.advance(part.rows)
        tokenized.append(part)
    return tokenized


def _check_parts(parts: list[TokensPart], pairs: Artifact) -> None:
    """Raise UserError if the pairs of a record are in two parts: they would become two records."""
    ordered = sorted((part for part in parts if part.first_id is not None), key=lambda part: part.path)
    for before, after in pairwise(ordered):
        if before.table == after.table and before.last_id == after.first_id:
            raise UserError(f"{pairs.uri}: record {after.first_id!r}: its pairs are in {before.path} and {after.path}")


@functools.cache
def _load_tokenizer(student: Student, identity: str) -> tuple[Any, VisionProcessor | None]:
    """Return tokenizer and vision processor, cached per process; `identity` changes if the student's files do."""
    del identity
    vision_processor = load_vision_processor(student)
    return (vision_processor.tokenizer if vision_processor else load_tokenizer(student)), vision_processor
