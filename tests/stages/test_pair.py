"""Pairs are drawn part by part on the workers, and are the same as if one process drew them row by row."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from pathlib import Path
from typing import Literal

import pytest

from mint_ray.artifacts import Artifact, File, PartResult, open_artifact, read_part, verify
from mint_ray.config.loader import UserError, dump, from_data
from mint_ray.config.stages import Gate, Pair
from mint_ray.records import (
    Label,
    Message,
    Phenotype,
    Prediction,
    PreferencePair,
    Record,
    Split,
    TeacherScores,
    from_table,
)
from mint_ray.samplers import (
    AnySampler,
    Confusion,
    Hard,
    Mixture,
    MixtureMember,
    OnPolicy,
    Permuted,
    SamplerContext,
    Sibling,
    Truth,
    Uniform,
    difficulty,
    to_affinity_matrix,
)
from mint_ray.samplers.negative_controls import is_swapped, permute_labels
from mint_ray.stages import pair as module
from mint_ray.stages.pair import (
    PairingInputs,
    PairingTask,
    ScoresPart,
    check_gate,
    draw_pairs,
    find_siblings,
    sample_pairs,
)
from mint_ray.tasks import build_task
from mint_ray.tasks.config import AnyTask, ImageLabel, NamedLabel, RareDisease
from tests.stages.inputs import interrupt_before_publishing, write_records

LABELS = [Label(label_id=f"OMIM:{number}", name=f"Disease {number}") for number in range(1, 9)]
IDS = [label.label_id for label in LABELS]
SPLITS: list[Split] = ["train", "train", "validation", "train", "test"]
RECORDS = [
    Record(
        record_id=f"r{number:02d}", group_id=f"g{number}", label_id=IDS[number % 3] if number % 7 else None,
        split=SPLITS[number % 5],
        text="He said: which diseases?" if number == 3 else None,
        phenotypes=[Phenotype(id="HP:0001250", label="Seizure"), Phenotype(id="HP:0004322", label="Short stature")],
        fields={"sex": "MALE", "age": f"P{number}Y"},
    )
    for number in range(25)
]  # fmt: skip
FAILED = {"r06", "r24"}


def rank(record: Record) -> TeacherScores:
    """Return a ranking that differs from record to record, or a failed one."""
    number = int(record.record_id[1:])
    if record.record_id in FAILED:
        return TeacherScores(
            record_id=record.record_id, split=record.split, teacher="t", labels=[], scores=[], status="failed",
            reason="no_known_phenotype",
        )  # fmt: skip
    order = IDS[number % 8 :] + IDS[: number % 8]
    scores = [1 / place**0.5 for place in range(1, 9)]
    return TeacherScores(record_id=record.record_id, split=record.split, teacher="t", labels=order, scores=scores)


RANKINGS = {record.record_id: rank(record) for record in RECORDS}


def write_inputs(
    root: Path, records: list[Record], rankings: list[TeacherScores], *, parts: tuple[int, int] = (10, 6)
) -> tuple[Artifact, Artifact]:
    """Write records and scores in parts of `parts` rows."""
    prepared = write_records(root, records, LABELS, rows_per_part=parts[0])
    scored = open_artifact(str(root), "score", {"rows": [len(rankings), *parts]}, {"records": prepared.name})
    with scored.write() as draft:
        draft.metrics["scores"] = {}
        draft.write_rows(TeacherScores, "scores", rankings, rows_per_part=parts[1])
    return prepared, scored


def draw(root: Path, sampler: AnySampler, inputs: tuple[Artifact, Artifact]) -> Artifact:
    return draw_pairs(str(root), Pair(sampler=sampler), RareDisease(), *inputs)


def row_by_row(sampler: AnySampler, split: Split, context: SamplerContext) -> list[PreferencePair]:
    """Return the pairs that the stage should write for a split."""
    task = build_task(RareDisease(), LABELS, sampler.top)
    pairs = []
    for record in RECORDS:
        scores = RANKINGS[record.record_id]
        if record.split != split or scores.status == "failed":
            continue
        prompt, note = task.prompt(record), task.note(record)
        score = dict(zip(scores.labels, scores.scores, strict=True))
        start = prompt[-1].content.index(note)
        for chosen, rejected in sampler.draw(scores, record.label_id, context):
            pairs.append(
                PreferencePair(
                    prompt=prompt, chosen=[Message(role="assistant", content=task.answer(chosen))],
                    rejected=[Message(role="assistant", content=task.answer(rejected))], record_id=record.record_id,
                    split=split, teacher="t", sampler=sampler.for_record(record.record_id).kind, chosen_labels=chosen,
                    rejected_labels=rejected, chosen_scores=[score[label] for label in chosen],
                    rejected_scores=[score[label] for label in rejected],
                    difficulty=difficulty(scores, chosen, rejected), note_span=[start, start + len(note)],
                )
            )  # fmt: skip
    return pairs


def expected_confusions(top: int) -> Counter[tuple[str, str]]:
    """Return how often a label of the validation split has another one among the teacher's first labels."""
    counts: Counter[tuple[str, str]] = Counter()
    for record in RECORDS:
        if record.split == "validation" and record.label_id:
            for label in RANKINGS[record.record_id].labels[:top]:
                counts[record.label_id, label] += label != record.label_id
    return +counts


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    return write_inputs(tmp_path_factory.mktemp("inputs"), RECORDS, list(RANKINGS.values()))


MIXTURE = Mixture(
    top=2,
    pairs_per_record=2,
    truth_first=True,
    members=(
        MixtureMember(sampler=Confusion(temperature=1.0)),
        MixtureMember(sampler=Uniform()),
        MixtureMember(sampler=Permuted()),
    ),
)


@pytest.fixture(scope="module")
def mixed(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory, inputs: tuple[Artifact, Artifact]) -> Artifact:
    return draw(tmp_path_factory.mktemp("mixed"), MIXTURE, inputs)


@pytest.mark.ray
def test_parts_have_the_pairs_that_are_drawn_row_by_row(mixed: Artifact) -> None:
    context = SamplerContext(confusions=to_affinity_matrix(expected_confusions(2)))
    for split in ("train", "validation"):
        expected = row_by_row(MIXTURE, split, context)
        assert mixed.rows(PreferencePair, split) == expected
        assert mixed.manifest.counts[f"pairs_{split}"] == len(expected) > 0
    assert {pair.sampler for pair in mixed.rows(PreferencePair, "train")} == {"confusion", "uniform", "permuted"}
    assert mixed.manifest.dropped == {"teacher_failed": len(FAILED - {"r24"})}
    assert mixed.manifest.counts["labels_confused"] == len(context.confusions)
    assert verify(mixed.uri) == []


@pytest.mark.ray
def test_the_order_of_records_and_their_parts_change_no_pair(
    ray_cluster: None, tmp_path: Path, mixed: Artifact
) -> None:
    other = write_inputs(tmp_path, RECORDS[::-1], list(RANKINGS.values()), parts=(3, 100))
    drawn = draw(tmp_path, MIXTURE, other)
    for split in ("train", "validation"):
        assert drawn.rows(PreferencePair, split) == mixed.rows(PreferencePair, split)


@pytest.mark.ray
def test_the_driver_reads_no_rows_except_labels(
    ray_cluster: None, inputs: tuple[Artifact, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Artifact.rows

    def rows(self: Artifact, row: type, table: str) -> list[Label]:
        assert row is Label
        return read(self, row, table)

    monkeypatch.setattr(module, "read_part", lambda uri, *_: pytest.fail(f"the driver read {uri}"))
    monkeypatch.setattr(Artifact, "rows", rows)
    assert draw(tmp_path, Confusion(top=2), inputs).is_complete


def write_ranking(root: Path, student: Literal["base", "aligned"], shift: int) -> tuple[Artifact, dict[str, list[str]]]:
    """Write a student's rankings of the labels for the training and validation records; that of r02 is empty."""
    rankings = {
        record.record_id: [] if record.record_id == "r02" else IDS[(number + shift) % 8 :] + IDS[: (number + shift) % 8]
        for number, record in enumerate(RECORDS)
        if record.split != "test"
    }
    artifact = open_artifact(str(root), "rank", {"student": student}, {})
    with artifact.write() as draft:
        rows = [
            Prediction(
                record_id=record_id, student=student, mode="rank", labels=labels, text="",
                reason=None if labels else "empty",
            )
            for record_id, labels in rankings.items()
        ]  # fmt: skip
        # for records in parts of ten; each of their parts has several parts of answers
        for part, start in (("00000-000", 0), ("00000-001", 4), ("00001-000", 8), ("00002-000", 16)):
            stop = {0: 4, 4: 8, 8: 16}.get(start)
            draft.placed.append(artifact.write_part(f"answers/part-{part}.parquet", Prediction, rows[start:stop]))
    return artifact, rankings


@pytest.mark.ray
def test_labels_that_students_rank_first_are_rejected_and_those_that_fill_a_list_are_counted(
    ray_cluster: None, tmp_path: Path, inputs: tuple[Artifact, Artifact]
) -> None:
    uri = "s3://bucket/train-0123456789ab"
    base, base_rankings = write_ranking(tmp_path, "base", 3)
    aligned, aligned_rankings = write_ranking(tmp_path, "aligned", 0)
    sampler = Mixture(
        top=2,
        pairs_per_record=2,
        members=(
            MixtureMember(sampler=OnPolicy(student_top_k=4)),
            MixtureMember(sampler=OnPolicy(student=uri)),
            MixtureMember(sampler=Hard()),
        ),
    )
    rankings = {None: base_rankings, uri: aligned_rankings}
    drawn = draw_pairs(str(tmp_path), Pair(sampler=sampler), RareDisease(), *inputs, {None: base, uri: aligned})
    context, filled = SamplerContext(student_rankings=rankings), 0
    for split in ("train", "validation"):
        rows = drawn.rows(PreferencePair, split)
        assert rows == row_by_row(sampler, split, context)
        for row in rows:
            member = sampler.for_record(row.record_id)
            if isinstance(member, OnPolicy):
                ranked_first = rankings[member.student][row.record_id][: member.student_top_k]
                filled += sum(label not in ranked_first for label in row.rejected_labels)
    assert {row.sampler for row in rows} == {"hard", "on_policy"}
    assert drawn.manifest.counts["labels_filled"] == filled > 0
    assert drawn.manifest.inputs["ranking of base"] == base.name
    assert drawn.manifest.inputs[f"ranking of {uri}"] == aligned.name


class DiesOnce(PairingTask):
    """A task whose process ends once, after it has written the second part and before it returns."""

    def work(self, part: ScoresPart) -> PartResult:
        result = super().work(part)
        marker = Path(self.artifact.root) / "died"
        if part.number == 1 and not marker.exists():
            marker.touch()
            os._exit(1)
        return result


@pytest.mark.ray
def test_a_worker_failure_changes_no_byte(
    ray_cluster: None,
    inputs: tuple[Artifact, Artifact],
    mixed: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PairingTask", DiesOnce)
    drawn = draw(tmp_path, MIXTURE, inputs)
    assert (tmp_path / "died").exists()
    assert drawn.manifest.files == mixed.manifest.files
    assert drawn.manifest.counts == mixed.manifest.counts
    assert verify(drawn.uri) == []


class Raises(PairingTask):
    """A task that must not run."""

    def work(self, part: ScoresPart) -> PartResult:
        raise UserError(f"{part.path} was drawn again")


@pytest.mark.ray
def test_parts_from_before_an_interruption_are_not_drawn_again(
    ray_cluster: None,
    inputs: tuple[Artifact, Artifact],
    mixed: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with interrupt_before_publishing("pair"):
        draw(tmp_path, MIXTURE, inputs)
    monkeypatch.setattr(module, "PairingTask", Raises)
    assert draw(tmp_path, MIXTURE, inputs).manifest.files == mixed.manifest.files


@pytest.mark.ray
def test_scores_of_a_record_that_does_not_exist_are_an_error(ray_cluster: None, tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path, [*RECORDS[:3], *RECORDS[4:]], list(RANKINGS.values()))
    with pytest.raises(UserError, match=r"prepare-\w+: record 'r03' has scores but is not in table 'records'$"):
        draw(tmp_path, Hard(top=2), inputs)


def make_task(
    artifact: Artifact, config: Pair, task: AnyTask, inputs: tuple[Artifact, Artifact], pairs_per_part: int
) -> PairingTask:
    records, scores = inputs
    sources = PairingInputs(records=records, scores=scores, rankings={}, labels=LABELS)
    return PairingTask(artifact, config, task, sources, SamplerContext(), pairs_per_part)


def first_part(scores: Artifact) -> ScoresPart:
    path = "scores/part-00000.parquet"
    return ScoresPart(path=path, uri=scores.file_uri(path), number=0, record_parts=["records/part-00000.parquet"])


def draw_control(
    root: Path, inputs: tuple[Artifact, Artifact], control: str | None, sampler: AnySampler
) -> list[PreferencePair]:
    """Return the pairs of all parts of the scores, drawn in this process."""
    artifact = open_artifact(str(root), "pair", {"control": control}, {})
    config = from_data(Pair, {**dump(Pair(sampler=sampler)), "control": control})
    task, scores = make_task(artifact, config, RareDisease(), inputs, pairs_per_part=100), inputs[1]
    results = [
        task.work(ScoresPart(path=file.path, uri=scores.file_uri(file.path), number=number, record_parts=[]))
        for number, file in enumerate(scores.table_files("scores"))
    ]
    return [pair for result in results for pairs in read_pairs(artifact, result.files) for pair in pairs]


def test_the_control_swapped_exchanges_both_sides_of_half_of_the_records(
    tmp_path: Path, inputs: tuple[Artifact, Artifact]
) -> None:
    plain = draw_control(tmp_path, inputs, None, Hard(top=2, pairs_per_record=2))
    control = draw_control(tmp_path, inputs, "swapped", Hard(top=2, pairs_per_record=2))
    swapped = {pair.record_id for pair in plain if is_swapped(pair.record_id)}
    assert 0 < len(swapped) < len({pair.record_id for pair in plain})
    for before, after in zip(plain, control, strict=True):
        if before.record_id in swapped:
            assert (before.chosen, before.chosen_labels, before.chosen_scores) == (
                after.rejected, after.rejected_labels, after.rejected_scores
            )  # fmt: skip
            assert (before.rejected, before.rejected_labels) == (after.chosen, after.chosen_labels)
        else:
            assert (before.chosen, before.rejected) == (after.chosen, after.rejected)
        assert after.sampler == "hard, swapped"
        assert before.prompt == after.prompt


@pytest.mark.parametrize("sampler", [Hard(top=2, truth_first=True), Truth(top=2)])
def test_the_control_relabelled_gives_every_label_the_name_of_another(
    tmp_path: Path, inputs: tuple[Artifact, Artifact], sampler: AnySampler
) -> None:
    plain, control = (draw_control(tmp_path, inputs, name, sampler) for name in (None, "relabelled"))
    new = permute_labels(IDS)
    task = build_task(RareDisease(), LABELS, 2)
    for before, after in zip(plain, control, strict=True):
        assert after.chosen_labels == [new[label] for label in before.chosen_labels]
        assert after.rejected_labels == [new[label] for label in before.rejected_labels]
        assert after.chosen[0].content == task.answer(after.chosen_labels)
        assert after.chosen_scores == before.chosen_scores
        assert after.sampler == f"{sampler.kind}, relabelled"


def draw_first_part(root: Path, inputs: tuple[Artifact, Artifact], pairs_per_part: int) -> tuple[Artifact, PartResult]:
    """Draw the pairs of the first part of the scores in this process."""
    artifact = open_artifact(str(root), "pair", {}, {})
    config = Pair(sampler=Hard(top=2, pairs_per_record=3))
    task = make_task(artifact, config, RareDisease(), inputs, pairs_per_part)
    return artifact, task.work(first_part(inputs[1]))


def read_pairs(artifact: Artifact, files: list[File]) -> list[list[PreferencePair]]:
    return [from_table(PreferencePair, read_part(artifact.file_uri(file.path))) for file in files]


def test_pairs_of_one_record_stay_in_one_part(tmp_path: Path, inputs: tuple[Artifact, Artifact]) -> None:
    artifact, result = draw_first_part(tmp_path, inputs, pairs_per_part=4)
    ids = [[pair.record_id for pair in part] for part in read_pairs(artifact, result.files)]
    # r02 is in the validation split, r04 in the test split
    assert ids == [["r00"] * 3 + ["r01"] * 3, ["r03"] * 3 + ["r05"] * 3, ["r02"] * 3]
    assert [file.path for file in result.files] == [
        "train/part-00000-000.parquet", "train/part-00000-001.parquet", "validation/part-00000-000.parquet"
    ]  # fmt: skip
    assert result.rows == 6


def test_the_span_of_a_pair_is_the_note_of_its_task(tmp_path: Path, inputs: tuple[Artifact, Artifact]) -> None:
    artifact, result = draw_first_part(tmp_path, inputs, pairs_per_part=2_000)
    task = build_task(RareDisease(), LABELS, 2)
    notes = {record.record_id: task.note(record) for record in RECORDS}
    pairs = [pair for part in read_pairs(artifact, result.files) for pair in part]
    assert {pair.record_id for pair in pairs} == {"r00", "r01", "r02", "r03", "r05"}
    for pair in pairs:
        assert pair.note_span is not None
        start, stop = pair.note_span
        assert pair.prompt[-1].role == "user"
        assert pair.prompt[-1].content[start:stop] == notes[pair.record_id]
        assert pair.prompt[-1].content[stop:].startswith("\n\nList the 2 most likely")


def test_pairs_have_the_image_if_the_task_shows_it(tmp_path: Path) -> None:
    with_image = [dataclasses.replace(record, image_uri=f"{record.record_id}.jpg") for record in RECORDS]
    inputs = write_inputs(tmp_path, [*with_image[:3], *RECORDS[3:]], list(RANKINGS.values()))
    named = tuple(NamedLabel(label_id=label.label_id, name=label.name) for label in LABELS)
    all_ids = ["r00", "r01", "r02", "r03", "r05"]
    for task, expected in (
        (ImageLabel(names=named), {"r00": "r00.jpg", "r01": "r01.jpg", "r02": "r02.jpg"}),
        (ImageLabel(names=named, visible_fields=("sex",), show_image=False), dict.fromkeys(all_ids)),
    ):
        artifact = open_artifact(str(tmp_path), "pair", {"show_image": task.show_image}, {})
        pairing = make_task(artifact, Pair(sampler=Hard(top=2)), task, inputs, pairs_per_part=9)
        result = pairing.work(first_part(inputs[1]))
        pairs = [pair for part in read_pairs(artifact, result.files) for pair in part]
        assert {pair.record_id: pair.image_uri for pair in pairs} == expected
        assert result.dropped == ({"no_image": 2} if task.show_image else {})
        spans = {str(pair.note_span) for pair in pairs}
        assert spans == ({"None"} if task.show_image else {"[0, 9]"})


@pytest.mark.ray
def test_an_empty_validation_split_has_an_empty_table_and_no_confusions(ray_cluster: None, tmp_path: Path) -> None:
    train = [record for record in RECORDS if record.split == "train"]
    inputs = write_inputs(tmp_path, train, [RANKINGS[record.record_id] for record in train])
    drawn = draw(tmp_path, Hard(top=2), inputs)
    assert drawn.manifest.counts["pairs_validation"] == 0
    assert drawn.tables() == ["train", "validation"]
    with pytest.raises(UserError, match=r"^pair\.sampler: confusion needs confusions of the teacher on the validation"):
        draw(tmp_path, Confusion(top=2), inputs)


@pytest.mark.ray
def test_a_sampler_that_draws_nothing_is_an_error(ray_cluster: None, tmp_path: Path) -> None:
    short = [
        TeacherScores(
            record_id=record.record_id, split=record.split, teacher="t", labels=IDS[:3], scores=[3.0, 2.0, 1.0]
        )
        for record in RECORDS
    ]
    with pytest.raises(UserError, match=r"^pair\.sampler: hard drew no pair from 25 records$"):
        draw(tmp_path, Hard(top=2), write_inputs(tmp_path, RECORDS, short))


def test_a_teacher_below_a_minimum_of_the_gate_or_not_measured_is_an_error() -> None:
    gate = Gate(top_1_accuracy=0.5, coverage=0.9)
    check_gate(gate, {"top_1_accuracy": 0.5, "coverage": 0.9, "records": 10})
    with pytest.raises(UserError, match=r"^pair\.gate\.coverage: the teacher has 0\.8 on 10 validation records"):
        check_gate(gate, {"top_1_accuracy": 0.6, "coverage": 0.8, "records": 10})
    with pytest.raises(UserError, match=r"^pair\.gate\.top_1_accuracy: the teacher has None on 0 validation records"):
        check_gate(gate, {})


def test_siblings_need_labels_that_are_annotated(
    tmp_path: Path, inputs: tuple[Artifact, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "map_parts", lambda *_, **__: pytest.fail("work was started"))
    expected = (
        r"^pair\.sampler: sibling needs labels .* it annotates 0 of the task's 8, and not 'OMIM:1' \(Disease 1\)$"
    )
    with pytest.raises(UserError, match=expected):
        draw(tmp_path, Sibling(top=2), inputs)


def test_siblings_are_ordered_by_the_similarity_of_their_findings() -> None:
    names = {"OMIM:163950": "Noonan syndrome 1", "OMIM:151100": "LEOPARD syndrome 1", "OMIM:154700": "Marfan syndrome"}
    siblings = find_siblings([Label(label_id=label_id, name=name) for label_id, name in names.items()])
    assert list(siblings["OMIM:163950"]) == ["OMIM:151100", "OMIM:154700"]


@pytest.mark.ray
def test_sampled_pairs_are_evenly_spaced_and_always_the_same(mixed: Artifact) -> None:
    rows = mixed.rows(PreferencePair, "train")
    shown = sample_pairs(mixed, 4)
    assert shown == sample_pairs(mixed, 4) == [rows[number * len(rows) // 4] for number in range(4)]
    assert sample_pairs(mixed, 1_000) == rows
