"""Draw preference pairs from a teacher's scores, once the teacher has passed its gate."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from mint_ray.artifacts import Artifact, Draft, open_artifact
from mint_ray.loading import UserError, dump
from mint_ray.records import Label, Message, PreferencePair, Record, Split, TeacherScores
from mint_ray.reports.card import CARD, describe_pairs
from mint_ray.stages.config import Gate, Pair
from mint_ray.tasks import Task, build_task
from mint_ray.tasks.config import AnyTask

logger = logging.getLogger("mint_ray")

PAIRS_PER_PART = 2_000
"""About so many pairs are tokenised by one task."""
DRAWN: tuple[Split, ...] = ("train", "validation")


def draw_pairs(root: str, config: Pair, task: AnyTask, records: Artifact, scores: Artifact) -> Artifact:
    """Tables `train` and `validation` of pairs in TRL's conversational columns.

    Raises UserError when the teacher is under a floor of the gate, or the lists are longer than the labels reach.
    """
    inputs = {"records": records.name, "scores": scores.name}
    artifact = open_artifact(root, "pair", {"pair": dump(config), "task": dump(task)}, inputs)
    if artifact.is_complete:
        return artifact
    measured = scores.manifest.metrics["scores"]
    check_gate(config.gate, measured)
    labels = records.rows(Label, "labels")
    check_lengths(config, len(labels))
    asked = build_task(task, labels, config.sampler.top)
    by_id = {record.record_id: record for record in records.rows(Record, "records")}
    rankings = scores.rows(TeacherScores, "scores")
    with artifact.write() as draft:
        draft.metrics["gate"] = measured
        for split in DRAWN:
            drawn = (row for row in rankings if row.split == split)
            draft.counts[f"pairs_{split}"] = draft.write_rows(
                PreferencePair,
                split,
                _pairs(config, asked, by_id, drawn, draft),
                rows_per_part=PAIRS_PER_PART,
                together=lambda pair: pair.record_id,
            )
        if draft.counts["pairs_train"] == 0:
            raise UserError(f"pair.sampler: {config.sampler.kind} drew no pair from {len(rankings)} rankings")
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
    """Raise UserError if one record's chosen and rejected lists cannot be disjoint."""
    sampler = config.sampler
    if sampler.top + sampler.rejected_length > labels:
        raise UserError(
            f"pair.sampler: top {sampler.top} and bottom {sampler.rejected_length} need more labels than the "
            f"task's {labels}"
        )


def _pairs(
    config: Pair, task: Task, by_id: dict[str, Record], rankings: Iterator[TeacherScores], draft: Draft
) -> Iterator[PreferencePair]:
    for scores in rankings:
        if scores.status == "failed":
            draft.dropped["teacher_failed"] += 1
            continue
        record = by_id[scores.record_id]
        drawn = config.sampler.draw(scores, record.label_id)
        if not drawn:
            draft.dropped["too_few_labels_to_reject"] += 1
        prompt = task.prompt(record)
        span = note_span(prompt, task.note(record))
        for chosen, rejected in drawn:
            yield PreferencePair(
                prompt=prompt,
                chosen=[Message(role="assistant", content=task.answer(chosen))],
                rejected=[Message(role="assistant", content=task.answer(rejected))],
                record_id=record.record_id,
                split=record.split,
                teacher=scores.teacher,
                sampler=config.sampler.kind,
                chosen_labels=chosen,
                rejected_labels=rejected,
                note_span=span,
            )


def note_span(prompt: list[Message], note: str) -> list[int] | None:
    """Where the last message of the prompt holds the note word for word: [start, end) in characters, or None."""
    start = prompt[-1].content.find(note)
    return None if start < 0 else [start, start + len(note)]
