"""Turn pairs into tokens, once for every training that reads them alike: part by part, from storage to storage."""

from __future__ import annotations

import dataclasses
import functools
import logging
from itertools import pairwise
from typing import Any

import torch

from mint_ray.artifacts import Artifact, File, open_artifact, read_part
from mint_ray.config.loader import UserError
from mint_ray.config.stages import Train
from mint_ray.models.vision_processor import Sight
from mint_ray.objectives import build_objective
from mint_ray.records import PreferencePair, TokenizedRecord, from_table
from mint_ray.runtime.map_parts import map_parts
from mint_ray.students import load_sight, load_tokenizer, student_revision
from mint_ray.students.config import Student
from mint_ray.telemetry import Progress, record_failed_rows
from mint_ray.trainers.examples import to_row
from mint_ray.trainers.reference import Reference
from mint_ray.trainers.tokenization import tokenize_pairs as to_tokens

logger = logging.getLogger("mint_ray")

ROWS_PER_PART = 1_024
"""Most records in one part of the output; a training process holds a few parts at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PairsPart:
    """One part of the pairs: the work of one task."""

    table: str
    path: str
    uri: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokensPart:
    """What a task made of one part of the pairs: all that the driver ever sees of them."""

    table: str
    path: str
    """Of the part that was read."""
    pairs: int
    """Rows of the part that was read."""
    first_id: str | None
    """Record of its first row; None of a part without rows."""
    last_id: str | None
    files: list[File]
    counts: dict[str, int]
    dropped: dict[str, int]
    longest: int
    """Tokens of the longest record, before anything was cut."""
    longest_id: str


def tokenize_pairs(root: str, config: Train, pairs: Artifact) -> Artifact:
    """Tables `train` and `validation` of `TokenizedRecord`, written by the workers that made them.

    Named by what decides the tokens alone, so that trainings which differ in beta or learning rate share them. For an
    objective that compares with the base student, each completion's log-probability under it is there too.
    Raises UserError when no record is left to train on, or the pairs of a record do not lie together.
    """
    trainer = config.trainer
    # what is computed in bfloat16 is compared with what was
    numbers = {"dtype": config.student.dtype, "bf16": trainer.bf16} if _uses_reference(config) else None
    artifact = open_artifact(
        root,
        "tokenize",
        {
            "model_id": config.student.model_id,
            "max_length": trainer.max_length,
            "overlong": trainer.overlong,
            "reference": numbers,
        },
        {"pairs": pairs.name, "student": student_revision(config.student)},
    )
    if artifact.is_complete:
        return artifact
    with artifact.write() as draft:
        made = _tokenize(artifact, config, pairs)
        for part in made:
            draft.placed += part.files
            draft.counts.update(part.counts)
            draft.dropped.update(part.dropped)
        if not draft.counts["records_train"]:
            longest, record_id = max((part.longest, part.longest_id) for part in made)
            if not longest:
                reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(draft.dropped.items())) or "none"
                raise UserError(f"{pairs.uri}: no record to train on is left; dropped: {reasons}")
            raise UserError(
                f"train.trainer.max_length: no record to train on has {trainer.max_length} tokens or fewer; the "
                f"longest, {record_id!r}, has {longest:,}"
            )
        _check_parts(made, pairs)
    logger.info("tokenize: %s", ", ".join(f"{name} {count:,}" for name, count in draft.counts.items()))
    return artifact


class TokenizingActor:
    """Holds the student's tokenizer on a worker, and the base student where its log-probabilities are asked for."""

    def __init__(self, artifact: Artifact, config: Train) -> None:
        self.artifact = artifact
        self.trainer = config.trainer
        self.tokenizer, self.sight = _load_reader(config.student, artifact.inputs["student"])
        self.reference: Reference | None = None
        if _uses_reference(config):
            torch.set_num_threads(max(1, int(config.resources.cpus_per_worker)))
            self.reference = Reference(config.student, config.trainer, config.resources, self.sight)

    def work(self, part: PairsPart) -> TokensPart:
        rows = from_table(PreferencePair, read_part(part.uri))
        examples, tally = to_tokens(rows, self.tokenizer, self.trainer.max_length, self.trainer.overlong, self.sight)
        if self.reference is not None:
            examples = self.reference.judge(examples)
        name = part.path.removesuffix(".parquet")
        # an empty part too is written, so that the table is there
        files = [
            self.artifact.write_part(
                f"{name}-{number:03d}.parquet",
                TokenizedRecord,
                [to_row(example) for example in examples[start : start + ROWS_PER_PART]],
            )
            for number, start in enumerate(range(0, max(1, len(examples)), ROWS_PER_PART))
        ]
        record_failed_rows("tokenize", self.artifact.name, tally.dropped)
        counts = {
            "records": len({example.record_id for example in examples}),
            "pairs": sum(len(example.pairs) for example in examples),
            "tokens": sum(len(example.prompt_ids) + sum(map(len, example.completions)) for example in examples),
            "cut": tally.cut,
        }
        return TokensPart(
            table=part.table,
            path=part.path,
            pairs=len(rows),
            first_id=rows[0].record_id if rows else None,
            last_id=rows[-1].record_id if rows else None,
            files=files,
            counts={f"{name}_{part.table}": count for name, count in counts.items()},
            dropped=dict(tally.dropped),
            longest=tally.longest[0],
            longest_id=tally.longest[1],
        )


def _tokenize(artifact: Artifact, config: Train, pairs: Artifact) -> list[TokensPart]:
    files = [(table, file) for table in ("train", "validation") for file in pairs.table_files(table)]
    parts = [PairsPart(table=table, path=file.path, uri=pairs.file_uri(file.path)) for table, file in files]
    progress = Progress("tokenize", sum(file.rows or 0 for _, file in files), "pairs")
    resources = config.resources
    actors, cpus, gpus = None, 1.0, 0.0
    if _uses_reference(config):
        # as many as train later; a base student takes long to load
        actors = (1, min(resources.least_and_most_workers[1], len(parts)))
        cpus, gpus = resources.cpus_per_worker, resources.gpus_per_worker
    made: list[TokensPart] = []
    arguments = (artifact, config)
    for part in map_parts(artifact, parts, TokensPart, TokenizingActor, arguments, actors=actors, cpus=cpus, gpus=gpus):
        progress.advance(part.pairs)
        made.append(part)
    return made


def _check_parts(made: list[TokensPart], pairs: Artifact) -> None:
    """Raise UserError if a record's pairs go on in the next part: it would have become two."""
    ordered = sorted((part for part in made if part.first_id is not None), key=lambda part: part.path)
    for before, after in pairwise(ordered):
        if before.table == after.table and before.last_id == after.first_id:
            raise UserError(f"{pairs.uri}: record {after.first_id!r}: its pairs lie in {before.path} and {after.path}")


@functools.cache
def _load_reader(student: Student, revision: str) -> tuple[Any, Sight | None]:
    """The tokenizer, and what sees with it, which a process keeps from task to task; `revision` tells apart what lay at
    one place in turn."""
    sight = load_sight(student)
    return (sight.tokenizer if sight else load_tokenizer(student)), sight


def _uses_reference(config: Train) -> bool:
    return build_objective(config.trainer.objective).uses_reference
