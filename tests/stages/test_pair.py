"""Pairs say where their note stands, and those of one record stay in one part."""

from __future__ import annotations

from pathlib import Path

import pytest

from mint_ray.artifacts import Artifact, open_artifact, read_part
from mint_ray.records import Label, Phenotype, PreferencePair, Record, TeacherScores, from_table
from mint_ray.samplers import Hard
from mint_ray.stages import pair as module
from mint_ray.stages.config import Pair
from mint_ray.stages.pair import draw_pairs
from mint_ray.tasks import build_task
from mint_ray.tasks.config import RareDisease

LABELS = [Label(label_id=f"OMIM:{number}", name=f"Disease {number}") for number in range(1, 9)]
RECORDS = [
    Record(
        record_id=f"r{number}", group_id=f"g{number}", label_id="OMIM:1",
        text="He said: which diseases?" if number == 3 else None,
        phenotypes=[Phenotype(id="HP:0001250", label="Seizure"), Phenotype(id="HP:0004322", label="Short stature")],
        fields={"sex": "MALE", "age": f"P{number}Y"},
    )
    for number in range(7)
]  # fmt: skip


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """Three pairs of each record, in parts of about four."""
    monkeypatch.setattr(module, "PAIRS_PER_PART", 4)
    records, scores = (open_artifact(str(tmp_path), stage, {}, {}) for stage in ("prepare", "score"))
    with records.write() as draft:
        draft.write_rows(Label, "labels", LABELS)
        draft.write_rows(Record, "records", RECORDS)
    ranking = [label.label_id for label in LABELS]
    with scores.write() as draft:
        draft.metrics["scores"] = {}
        draft.write_rows(
            TeacherScores,
            "scores",
            [
                TeacherScores(
                    record_id=record.record_id, split="train", teacher="t", labels=ranking,
                    scores=[1 / rank for rank in range(1, 9)],
                )
                for record in RECORDS
            ],
        )  # fmt: skip
    sampler = Hard(top=2, pairs_per_record=3)
    return draw_pairs(str(tmp_path), Pair(sampler=sampler), RareDisease(), records, scores)


def test_the_span_of_a_pair_is_the_note_of_its_task(drawn: Artifact) -> None:
    task = build_task(RareDisease(), LABELS, 2)
    notes = {record.record_id: task.note(record) for record in RECORDS}
    pairs = drawn.rows(PreferencePair, "train")
    assert len(pairs) == 3 * len(RECORDS)
    for pair in pairs:
        assert pair.note_span is not None
        start, stop = pair.note_span
        assert pair.prompt[-1].role == "user"
        assert pair.prompt[-1].content[start:stop] == notes[pair.record_id]
        assert pair.prompt[-1].content[stop:].startswith("\n\nList the 2 most likely")


def test_pairs_of_one_record_stay_in_one_part(drawn: Artifact) -> None:
    parts = [from_table(PreferencePair, read_part(drawn.file_uri(file.path))) for file in drawn.table_files("train")]
    ids = [sorted({pair.record_id for pair in part}) for part in parts]
    assert ids == [["r0", "r1"], ["r2", "r3"], ["r4", "r5"], ["r6"]]
