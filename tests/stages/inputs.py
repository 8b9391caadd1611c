"""Artifacts and files that stages read, made for tests, and ways to run a stage without Ray or to its interruption."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mint_ray.artifacts import Artifact, open_artifact
from mint_ray.lineage import AnswerRequest
from mint_ray.records import SPLITS, Label, Message, Mode, Phenotype, PreferencePair, Record, Split
from mint_ray.students.config import Generation, Student
from mint_ray.students.constrained_decoding import AllowedAnswers
from mint_ray.students.generation import StudentGenerator
from mint_ray.tasks import Task, build_task
from mint_ray.tasks.config import RareDisease

DISEASES = [Label(label_id=f"OMIM:{number}", name=f"Disease {number}") for number in range(1, 8)]
FINDINGS = ["Seizure", "Short stature", "Ataxia", "Hearing impairment", "Cataract"]
_SPLITS: list[Split] = ["train", "train", "validation", "test"]
PATIENTS = [
    Record(
        record_id=f"r{number:02d}",
        group_id=f"g{number}",
        label_id=DISEASES[number % 7].label_id,
        split=_SPLITS[number % 4],
        fields={"age": f"P{number}Y"},
        phenotypes=[
            Phenotype(id=f"HP:000000{index}", label=finding) for index, finding in enumerate(FINDINGS[: 1 + number % 5])
        ],
    )
    for number in range(23)
]
"""Patients of the diseases, all with different notes."""
NUM_LABELS = 2
"""Labels that a student lists for a patient."""


def write_records(
    root: Path | str, records: Sequence[Record], labels: Sequence[Label], *, rows_per_part: int = 10_000
) -> Artifact:
    """Write records and labels as `prepare` does; other rows or parts give an artifact of another name."""
    content = hashlib.sha256(repr((records, labels, rows_per_part)).encode()).hexdigest()
    artifact = open_artifact(str(root), "prepare", {"content": content}, {})
    if not artifact.is_complete:
        with artifact.write() as draft:
            draft.write_rows(Record, "records", records, rows_per_part=rows_per_part)
            draft.write_rows(Label, "labels", labels)
            draft.counts.update(dict.fromkeys((f"records_{split}" for split in SPLITS), 0))
            draft.counts.update(f"records_{record.split}" for record in records)
            draft.counts["labels"] = len(labels)
    return artifact


def make_request(student: Student, mode: Mode = "free", splits: tuple[Split, ...] = ("test",)) -> AnswerRequest:
    """Return a request to a base student for answers about patients."""
    return AnswerRequest(
        student=student,
        generation=Generation(max_new_tokens=8),
        mode=mode,
        splits=splits,
        task=RareDisease(),
        num_labels=NUM_LABELS,
    )


def disease_task() -> Task:
    """Return the task of `make_request`."""
    return build_task(RareDisease(), DISEASES, NUM_LABELS)


def answer_one_by_one(request: AnswerRequest, records: Sequence[Record]) -> list[Any]:
    """Return the texts that the student generates, or its scores of the labels, for one prompt at a time."""
    task = disease_task()
    answers = AllowedAnswers(labels=tuple(label.label_id for label in DISEASES), length=NUM_LABELS, to_text=task.answer)
    generator = StudentGenerator(request.student, request.generation, answers=answers, batch_size=1)
    generate: Any = {
        "free": generator.generate, "constrained": generator.generate_constrained, "rank": generator.rank,
    }[request.mode]  # fmt: skip
    return list(generate([task.prompt(record) for record in records]))


def make_pair(
    number: int, note: str, chosen: str, rejected: str, split: Split = "train", **changes: Any
) -> PreferencePair:
    """Return a pair of the record `r{number}`, whose prompt is the note."""
    return PreferencePair(
        prompt=[Message(role="user", content=note)],
        chosen=[Message(role="assistant", content=chosen)],
        rejected=[Message(role="assistant", content=rejected)],
        record_id=f"r{number}",
        split=split,
        teacher="t",
        sampler="hard",
        chosen_labels=["a"],
        rejected_labels=["b"],
        **changes,
    )


def write_pairs(root: Path | str, train: Sequence[PreferencePair], validation: Sequence[PreferencePair]) -> Artifact:
    """Write pairs as `pair` does, each table in one part; the same artifact for the same number of pairs."""
    artifact = open_artifact(str(root), "pair", {"train": len(train), "validation": len(validation)}, {})
    if not artifact.is_complete:
        with artifact.write() as draft:
            draft.write_rows(PreferencePair, "train", train)
            draft.write_rows(PreferencePair, "validation", validation)
    return artifact


def map_parts_here(artifact: Artifact, parts: Any, result: Any, workers: Any, *, preprocessing: Any = None) -> Any:
    """Do what `map_parts` does in this process, without Ray and completion records."""
    worker = workers.worker(*workers.arguments)
    decoder = preprocessing and preprocessing.worker(*preprocessing.arguments)
    for part in parts:
        done = worker.work(part, decoder.work(part)) if decoder else worker.work(part)
        assert isinstance(done, result)
        yield done


@contextmanager
def interrupt_before_publishing(stage: str) -> Iterator[None]:
    """Raise and catch a KeyboardInterrupt in the block when the stage has done its work and is about to publish it."""
    publish = Artifact._publish

    def interrupt(artifact: Artifact, *arguments: Any) -> bool:
        if artifact.stage == stage:
            raise KeyboardInterrupt
        return publish(artifact, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Artifact, "_publish", interrupt)
        yield


QUESTIONS = [
    ("The sky is", ["blue", "made of stone", "a kind of fish"], 0),
    ("Two and two make", ["nine", "four", "a boy of four years"], 1),
    ("A dog can", ["bark", "1. Noonan syndrome", "read"], 0),
    ("Liver and kidney are", ["rivers", "organs", "months"], 1),
]


def save_harness_task(folder: Path) -> Path:
    """Write the task `sky_and_sums` for lm-evaluation-harness, of four questions with three choices, into `folder`."""
    folder.mkdir()
    lines = [json.dumps({"question": q, "choices": choices, "answer": a}) for q, choices, a in QUESTIONS]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "sky_and_sums.yaml").write_text(f"""
task: sky_and_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "questions.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
""")
    return folder
