"""Draw preference pairs from the scores of a teacher that passed its gate."""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

import pyarrow as pa
import pyarrow.compute as pc

from mint_ray import lineage
from mint_ray.artifacts import Artifact, Draft, File, PartResult, read_part
from mint_ray.config.loader import UserError
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
from mint_ray.reports.dataset_card import CARD, render_dataset_card
from mint_ray.runtime.map_parts import Part, Workers, map_blocks, map_parts
from mint_ray.samplers import (
    AffinityMatrix,
    AnySampler,
    SamplerContext,
    count_confusions,
    difficulty,
    to_affinity_matrix,
)
from mint_ray.samplers.negative_controls import is_swapped, permute_labels
from mint_ray.tasks import build_task
from mint_ray.tasks.config import AnyTask
from mint_ray.telemetry import Progress, record_failed_rows, record_metric

logger = logging.getLogger("mint_ray")

PAIRS_PER_PART = 2_000
"""Approximate number of pairs per part: the work of one tokenizing task."""
DRAWN: tuple[Split, ...] = ("train", "validation")
ROWS_AT_ONCE = 1_024
"""Records converted to Python objects at a time; with thousands of labels a part of the scores is large."""
MAX_SIBLINGS = 200
"""Siblings kept per label: more than any list rejects."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScoresPart(Part):
    """One part of the scores: the work of one task; `path` is that of the scores, as several parts may be written."""

    number: int
    record_parts: list[str]
    """Parts of the records that have the same records if both are in the same order."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Confusion:
    """Number of validation records of one part with the true label `label` and `other` in the teacher's list."""

    label: str
    other: str
    count: int


def draw_pairs(
    root: str,
    config: Pair,
    task: AnyTask,
    records: Artifact,
    scores: Artifact,
    rankings: Mapping[str | None, Artifact] | None = None,
) -> Artifact:
    """Write tables `train` and `validation` of `PreferencePair`, in TRL's conversational columns.

    Each part of the scores is the work of one task; all pairs of a record are in one part. `rankings` are the students'
    rankings that the sampler needs, by URI of the student (None: the base student). Raises UserError if the teacher is
    below a minimum of the gate, if the task has fewer labels than the lists need, or if the data that the sampler needs
    is missing.
    """
    rankings = rankings or {}
    artifact = lineage.pair(root, config, task, records, scores, rankings)
    if artifact.is_complete:
        return artifact
    measured = scores.manifest.metrics["scores"]
    check_gate(config.gate, measured)
    labels = records.rows(Label, "labels")
    config.sampler.check_num_labels(len(labels))
    parts = _parts(records, scores)
    with artifact.write() as draft:
        draft.metrics["gate"] = measured
        context = _sampler_context(config.sampler, labels, records, parts, draft)
        progress = Progress("pair", sum(file.rows or 0 for file in scores.table_files("scores")), "records")
        inputs = PairingInputs(records=records, scores=scores, rankings=rankings, labels=labels)
        arguments = (artifact, config, task, inputs, context, PAIRS_PER_PART)
        for part in map_parts(artifact, parts, PartResult, Workers(worker=PairingTask, arguments=arguments)):
            progress.advance(part.rows)
            draft.add_part(part)
        if draft.counts["pairs_train"] == 0:
            raise UserError(f"pair.sampler: {config.sampler.kind} drew no pair from {progress.completed} records")
        draft.write_text(CARD, render_dataset_card(artifact, draft, records, scores))
    logger.info("pair: %s", ", ".join(f"{name} {count:,}" for name, count in draft.counts.items()))
    return artifact


def check_gate(gate: Gate, measured: dict[str, float]) -> None:
    """Raise UserError if a validation metric of the teacher is below its minimum, or was not measured."""
    for name in ("top_1_accuracy", "top_k_accuracy", "coverage"):
        minimum = getattr(gate, name)
        if minimum is not None and measured.get(name, 0.0) < minimum:
            raise UserError(
                f"pair.gate.{name}: the teacher has {measured.get(name)} on {measured.get('records', 0)} validation "
                f"records, the minimum is {minimum}"
            )


def sample_pairs(pairs: Artifact, count: int) -> list[PreferencePair]:
    """Return at most `count` training pairs, evenly spaced over the table; the same ones at each call."""
    files = pairs.table_files("train")
    ends = list(accumulate(file.rows or 0 for file in files))
    total = ends[-1]
    wanted = [number * total // count for number in range(count)] if count < total else list(range(total))
    found = []
    for file, end in zip(files, ends, strict=True):
        start = end - (file.rows or 0)
        indices = [index - start for index in wanted if start <= index < end]
        if indices:
            found += from_table(PreferencePair, read_part(pairs.file_uri(file.path)).take(indices))
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairingInputs:
    """Artifacts that pairs are drawn from."""

    records: Artifact
    scores: Artifact
    rankings: Mapping[str | None, Artifact]
    """Students' rankings by URI of the student; None for the base student."""
    labels: list[Label]


class PairingTask:
    """Task that draws the pairs of one part of the scores."""

    def __init__(
        self,
        artifact: Artifact,
        config: Pair,
        task: AnyTask,
        inputs: PairingInputs,
        context: SamplerContext,
        pairs_per_part: int,
    ) -> None:
        self.artifact, self.inputs = artifact, inputs
        self.sampler: AnySampler = config.sampler
        self.control = config.control
        ids = [label.label_id for label in inputs.labels]
        self.renamed = permute_labels(ids) if config.control == "relabelled" else dict(zip(ids, ids, strict=True))
        self.task = build_task(task, inputs.labels, config.sampler.top)
        self.context = context
        self.pairs_per_part = pairs_per_part
        # otherwise the garbage collector traverses the ontology repeatedly: a quarter of the run time
        gc.freeze()

    def work(self, part: ScoresPart) -> PartResult:
        """Draw and write the pairs of one part."""
        table = read_part(part.uri)
        scores = table.filter(pc.is_in(table["split"], value_set=pa.array(DRAWN)))
        records = read_records(self.inputs.records, part.record_parts, scores["record_id"])
        rankings = self._student_rankings(part.record_parts, scores["record_id"])
        context = dataclasses.replace(self.context, student_rankings=rankings)
        files: list[File] = []
        counts: Counter[str] = Counter()
        dropped: Counter[str] = Counter()
        stem = part.path.removeprefix("scores/").removesuffix(".parquet")
        for split in DRAWN:
            in_split = pc.equal(scores["split"], split)
            pairs_by_record = self._draw(records.filter(in_split), scores.filter(in_split), context, counts, dropped)
            # a table without rows has one empty part, so that it exists
            parts = list(_chunk(pairs_by_record, self.pairs_per_part)) or ([[]] if part.number == 0 else [])
            files += [
                self.artifact.write_part(f"{split}/{stem}-{number:03d}.parquet", PreferencePair, pairs)
                for number, pairs in enumerate(parts)
            ]
            counts[f"pairs_{split}"] = sum(map(len, parts))
        run = self.artifact.name
        record_metric("pairs_written", sum(counts[f"pairs_{split}"] for split in DRAWN), run=run)
        record_failed_rows("pair", run, dropped)
        return PartResult(path=part.path, rows=len(table), files=files, counts=dict(counts), dropped=dict(dropped))

    def _student_rankings(
        self, record_parts: list[str], wanted: pa.ChunkedArray
    ) -> dict[str | None, dict[str, list[str]]]:
        """Return each student's ranking of the records `wanted`: student to record id to label ids."""
        found = {}
        for student, answers in self.inputs.rankings.items():
            stems = tuple(
                path.replace("records/", "answers/", 1).removesuffix(".parquet") + "-" for path in record_parts
            )
            parts = [file.path for file in answers.table_files("answers") if file.path.startswith(stems)]
            table = read_records(answers, parts, wanted, ["record_id", "labels"], "answers")
            found[student] = dict(zip(table["record_id"].to_pylist(), table["labels"].to_pylist(), strict=True))
        return found

    def _draw(
        self,
        records: pa.Table,
        scores: pa.Table,
        context: SamplerContext,
        counts: Counter[str],
        dropped: Counter[str],
    ) -> Iterator[list[PreferencePair]]:
        for start in range(0, len(scores), ROWS_AT_ONCE):
            chunk = from_table(Record, records.slice(start, ROWS_AT_ONCE))
            for record, ranking in zip(chunk, _rows_from(scores, start), strict=True):
                if ranking.status == "failed":
                    dropped["teacher_failed"] += 1
                    continue
                if self.task.show_image and record.image_uri is None:
                    dropped["no_image"] += 1
                    continue
                pairs = self._pairs_of(record, ranking, context, counts)
                if pairs:
                    yield pairs
                else:
                    dropped["too_few_labels_to_reject"] += 1

    def _pairs_of(
        self, record: Record, scores: TeacherScores, context: SamplerContext, counts: Counter[str]
    ) -> list[PreferencePair]:
        sampler = self.sampler.for_record(record.record_id)
        drawn = sampler.draw(scores, record.label_id, context)
        if sampler.required_students:
            filled = (sampler.count_fallbacks(record.record_id, rejected, context) for _, rejected in drawn)
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
                image_uri=record.image_uri if self.task.show_image else None,
                note_span=span,
            )
            for chosen, rejected in drawn
        ]


class ConfusionTask:
    """Task that counts which labels the teacher confuses on the validation split."""

    def __init__(self, records: Artifact, top: int) -> None:
        self.records, self.top = records, top

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Count the confusions of each part of a batch."""
        counts: Counter[tuple[str, str]] = Counter()
        for part in from_table(ScoresPart, batch.cast(schema_of(ScoresPart))):
            table = read_part(part.uri)
            scores = table.filter(pc.equal(table["split"], "validation"))
            columns = ["record_id", "label_id"]
            records = read_records(self.records, part.record_parts, scores["record_id"], columns)
            for start in range(0, len(scores), ROWS_AT_ONCE):
                truths = records["label_id"].slice(start, ROWS_AT_ONCE).to_pylist()
                counts.update(count_confusions(_rows_from(scores, start), truths, self.top))
        return to_table(
            [Confusion(label=label, other=other, count=count) for (label, other), count in sorted(counts.items())],
            Confusion,
        )


def read_records(
    records: Artifact,
    expected_parts: list[str],
    wanted: pa.ChunkedArray,
    columns: list[str] | None = None,
    name: str = "records",
) -> pa.Table:
    """Return the records with the ids `wanted`, in that order.

    Args:
        records: Artifact with the table.
        expected_parts: Paths of the parts that are read first; others are read only if a record is missing.
        wanted: Record ids.
        columns: Columns that are read, `record_id` among them; None for all.
        name: Name of the table.

    Raises:
        UserError: A record is missing.
    """
    paths = [*expected_parts, *(file.path for file in records.table_files(name) if file.path not in expected_parts)]
    tables: list[pa.Table] = []
    for path in paths:
        table = read_part(records.file_uri(path), columns)
        tables.append(table.filter(pc.is_in(table["record_id"], value_set=wanted)))
        if sum(map(len, tables)) >= len(wanted):
            break
    found = pa.concat_tables(tables)
    indices = pc.index_in(wanted, value_set=found["record_id"])
    if indices.null_count:
        missing = wanted.filter(pc.is_null(indices))[0]
        raise UserError(f"{records.uri}: record {missing.as_py()!r} has scores but is not in table {name!r}")
    return found.take(indices)


def note_span(prompt: list[Message], note: str) -> list[int] | None:
    """Return [start, end) of the note in the last message of the prompt, in characters; None if it is not there."""
    if not note:
        return None
    start = prompt[-1].content.find(note)
    return None if start < 0 else [start, start + len(note)]


def _parts(records: Artifact, scores: Artifact) -> list[ScoresPart]:
    """Return the work of each task; the parts of the records are found by row numbers, as both tables are sorted."""
    bounds, end = [], 0
    for file in records.table_files("records"):
        bounds.append((end, end + (file.rows or 0), file.path))
        end += file.rows or 0
    found, start = [], 0
    for number, file in enumerate(scores.table_files("scores")):
        stop = start + (file.rows or 0)
        paths = [path for first, last, path in bounds if first < stop and last > start]
        found.append(ScoresPart(path=file.path, uri=scores.file_uri(file.path), number=number, record_parts=paths))
        start = stop
    return found


def _rows_from(scores: pa.Table, start: int) -> list[TeacherScores]:
    return from_table(TeacherScores, scores.slice(start, ROWS_AT_ONCE))


def _sampler_context(
    sampler: AnySampler,
    labels: list[Label],
    records: Artifact,
    parts: list[ScoresPart],
    draft: Draft,
) -> SamplerContext:
    """Return the data that the sampler requires for all records."""
    confusions: AffinityMatrix = {}
    siblings: AffinityMatrix = {}
    if "confusions" in sampler.requires:
        counts: Counter[tuple[str, str]] = Counter()
        blocks = [to_table([part], ScoresPart) for part in parts]
        for block in map_blocks(blocks, Workers(worker=ConfusionTask, arguments=(records, sampler.top))):
            for row in from_table(Confusion, block.cast(schema_of(Confusion))):
                counts[row.label, row.other] += row.count
        confusions = to_affinity_matrix(counts)
        if not confusions:
            raise UserError(
                f"pair.sampler: {sampler.kind} needs confusions of the teacher on the validation split; no record "
                f"there has a known label and another one among the teacher's first {sampler.top}"
            )
        draft.counts["labels_confused"] = len(confusions)
    if "siblings" in sampler.requires:
        siblings = find_siblings(labels)
        draft.counts["labels_with_siblings"] = len(siblings)
    return SamplerContext(confusions=confusions, siblings=siblings)


def find_siblings(labels: list[Label]) -> AffinityMatrix:
    """Return the most similar labels of each label, by the phenotypes that the Human Phenotype Ontology annotates.

    Raises UserError if it annotates fewer than two of the labels.
    """
    siblings = nearest_diseases([label.label_id for label in labels], MAX_SIBLINGS)
    if len(siblings) < 2:
        missing = next(label for label in labels if label.label_id not in siblings)
        raise UserError(
            f"pair.sampler: sibling needs labels that the Human Phenotype Ontology annotates; it annotates "
            f"{len(siblings)} of the task's {len(labels)}, and not {missing.label_id!r} ({missing.name})"
        )
    return siblings


def _chunk(pairs_by_record: Iterable[list[PreferencePair]], size: int) -> Iterator[list[PreferencePair]]:
    """Yield lists of about `size` pairs; the pairs of one record stay together."""
    chunk: list[PreferencePair] = []
    for pairs in pairs_by_record:
        if len(chunk) >= size:
            yield chunk
            chunk = []
        chunk += pairs
    if chunk:
        yield chunk
