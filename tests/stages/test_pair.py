"""Pairs are drawn part by part on the workers, and come out as if one process had drawn them row by row."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from pathlib import Path

import pytest

from mint_ray.artifacts import Artifact, File, open_artifact, read_part, verify
from mint_ray.config.loader import UserError, dump, from_data
from mint_ray.config.stages import Pair
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
from mint_ray.reports.pair import describe_pair
from mint_ray.samplers import (
    AnySampler,
    Confusion,
    Hard,
    Knowledge,
    Mixture,
    OnPolicy,
    Permuted,
    Share,
    Sibling,
    Truth,
    Uniform,
    difficulty,
    to_affinity,
)
from mint_ray.samplers.controls import is_swapped, rename_labels
from mint_ray.stages import pair as module
from mint_ray.stages.pair import (
    PairingActor,
    PairsPart,
    ScoresPart,
    check_lengths,
    draw_pairs,
    find_siblings,
    sample_pairs,
)
from mint_ray.tasks import build_task
from mint_ray.tasks.config import ImageLabel, NamedLabel, RareDisease

pytestmark = pytest.mark.ray

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
    """Every record has an order of its own."""
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
    """Records and scores in parts of so many rows."""
    made = {"rows": [len(records), len(rankings), *parts]}
    prepared, scored = (open_artifact(str(root), stage, made, {}) for stage in ("prepare", "score"))
    with prepared.write() as draft:
        draft.write_rows(Label, "labels", LABELS)
        draft.write_rows(Record, "records", records, rows_per_part=parts[0])
    with scored.write() as draft:
        draft.metrics["scores"] = {}
        draft.write_rows(TeacherScores, "scores", rankings, rows_per_part=parts[1])
    return prepared, scored


def draw(root: Path, sampler: AnySampler, inputs: tuple[Artifact, Artifact]) -> Artifact:
    return draw_pairs(str(root), Pair(sampler=sampler), RareDisease(), *inputs)


def row_by_row(sampler: AnySampler, split: Split, knowledge: Knowledge) -> list[PreferencePair]:
    """What the stage should write, without its parts."""
    task = build_task(RareDisease(), LABELS, sampler.top)
    pairs = []
    for record in RECORDS:
        scores = RANKINGS[record.record_id]
        if record.split != split or scores.status == "failed":
            continue
        prompt, note, score = (
            task.prompt(record),
            task.note(record),
            dict(zip(scores.labels, scores.scores, strict=True)),
        )
        start = prompt[-1].content.index(note)
        for chosen, rejected in sampler.draw(scores, record.label_id, knowledge):
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


def count_by_hand(top: int) -> Counter[tuple[str, str]]:
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
    members=(Share(sampler=Confusion(temperature=1.0)), Share(sampler=Uniform()), Share(sampler=Permuted())),
)


@pytest.fixture(scope="module")
def mixed(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory, inputs: tuple[Artifact, Artifact]) -> Artifact:
    return draw(tmp_path_factory.mktemp("mixed"), MIXTURE, inputs)


def test_parts_hold_what_one_process_draws_row_by_row(mixed: Artifact) -> None:
    knowledge = Knowledge(confusions=to_affinity(count_by_hand(2)))
    for split in ("train", "validation"):
        expected = row_by_row(MIXTURE, split, knowledge)
        assert mixed.rows(PreferencePair, split) == expected
        assert mixed.manifest.counts[f"pairs_{split}"] == len(expected) > 0
    assert {pair.sampler for pair in mixed.rows(PreferencePair, "train")} == {"confusion", "uniform", "permuted"}
    assert mixed.manifest.dropped == {"teacher_failed": len(FAILED - {"r24"})}
    assert mixed.manifest.counts["labels_confused"] == len(knowledge.confusions)
    assert verify(mixed.uri) == []


def test_the_order_of_records_and_their_parts_change_no_pair(
    ray_cluster: None, tmp_path: Path, mixed: Artifact
) -> None:
    other = write_inputs(tmp_path, RECORDS[::-1], list(RANKINGS.values()), parts=(3, 100))
    made = draw(tmp_path, MIXTURE, other)
    for split in ("train", "validation"):
        assert made.rows(PreferencePair, split) == mixed.rows(PreferencePair, split)


def test_the_driver_reads_no_rows_but_labels(
    ray_cluster: None, inputs: tuple[Artifact, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Artifact.rows

    def rows(self: Artifact, row: type, table: str) -> list[Label]:
        assert row is Label
        return read(self, row, table)

    monkeypatch.setattr(module, "read_part", lambda uri, *_: pytest.fail(f"the driver read {uri}"))
    monkeypatch.setattr(Artifact, "rows", rows)
    assert draw(tmp_path, Confusion(top=2), inputs).is_complete


def write_answers(root: Path, name: str, turn: int) -> tuple[Artifact, dict[str, list[str]]]:
    """How a student ranks the labels of every record that is not for the test; of one it could say nothing."""
    rankings = {
        record.record_id: [] if record.record_id == "r02" else IDS[(number + turn) % 8 :] + IDS[: (number + turn) % 8]
        for number, record in enumerate(RECORDS)
        if record.split != "test"
    }
    artifact = open_artifact(str(root), "answer", {"name": name}, {})
    with artifact.write() as draft:
        rows = [
            Prediction(record_id=record_id, method=name, labels=labels, text="", reason=None if labels else "empty")
            for record_id, labels in rankings.items()
        ]
        # where the records are in parts of ten, and the answers to them in parts of their own
        for part, start in (("00000-000", 0), ("00000-001", 4), ("00001-000", 8), ("00002-000", 16)):
            stop = {0: 4, 4: 8, 8: 16}.get(start)
            draft.placed.append(artifact.write_part(f"answers/part-{part}.parquet", Prediction, rows[start:stop]))
    return artifact, rankings


def test_what_students_answer_is_rejected_and_what_fills_up_is_counted(
    ray_cluster: None, tmp_path: Path, inputs: tuple[Artifact, Artifact]
) -> None:
    uri = "s3://bucket/train-0123456789ab"
    base, said = write_answers(tmp_path, "base", 3)
    aligned, learned = write_answers(tmp_path, "aligned", 0)
    sampler = Mixture(
        top=2,
        pairs_per_record=2,
        members=(Share(sampler=OnPolicy(within=4)), Share(sampler=OnPolicy(student=uri)), Share(sampler=Hard())),
    )
    made = draw_pairs(str(tmp_path), Pair(sampler=sampler), RareDisease(), *inputs, answers={None: base, uri: aligned})
    knowledge, filled = Knowledge(answers={None: said, uri: learned}), 0
    for split in ("train", "validation"):
        rows = made.rows(PreferencePair, split)
        assert rows == row_by_row(sampler, split, knowledge)
        for row in rows:
            member = sampler.for_record(row.record_id)
            if isinstance(member, OnPolicy):
                answers = {None: said, uri: learned}[member.student][row.record_id][: member.within]
                filled += sum(label not in answers for label in row.rejected_labels)
    assert {row.sampler for row in rows} == {"hard", "on_policy"}
    assert made.manifest.counts["labels_filled"] == filled > 0
    assert made.manifest.inputs["answers of the base student"] == base.name
    assert made.manifest.inputs[f"answers of {uri}"] == aligned.name


class DiesOnce(PairingActor):
    """Its worker is killed when it has written the second part, before it could say so."""

    def _work(self, part: ScoresPart) -> PairsPart:
        done = super()._work(part)
        marker = Path(self.artifact.root) / "died"
        if part.number == 1 and not marker.exists():
            marker.touch()
            os._exit(1)
        return done


def test_a_worker_that_dies_changes_no_byte(
    inputs: tuple[Artifact, Artifact], mixed: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PairingActor", DiesOnce)
    made = draw(tmp_path, MIXTURE, inputs)
    assert (tmp_path / "died").exists()
    assert made.manifest.files == mixed.manifest.files
    assert made.manifest.counts == mixed.manifest.counts
    assert verify(made.uri) == []


def test_a_record_without_which_there_are_scores_is_named(ray_cluster: None, tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path, [*RECORDS[:3], *RECORDS[4:]], list(RANKINGS.values()))
    with pytest.raises(UserError, match=r"prepare-\w+: record 'r03': has scores, but is not there$"):
        draw(tmp_path, Hard(top=2), inputs)


def control(
    root: Path, inputs: tuple[Artifact, Artifact], control: str | None, sampler: AnySampler
) -> list[PreferencePair]:
    """The pairs of all parts of the scores, drawn here."""
    artifact = open_artifact(str(root), "pair", {"control": control}, {})
    config = from_data(Pair, {**dump(Pair(sampler=sampler)), "control": control})
    actor = PairingActor(artifact, config, RareDisease(), LABELS, *inputs, {}, Knowledge(), 100)
    parts = enumerate(file.path for file in inputs[1].table_files("scores"))
    made = [actor._work(ScoresPart(number=number, path=path, near=[])) for number, path in parts]
    return [pair for part in made for pairs in read_pairs(artifact, part.files) for pair in pairs]


def test_the_control_swapped_exchanges_both_sides_of_half_of_the_records(
    tmp_path: Path, inputs: tuple[Artifact, Artifact]
) -> None:
    straight = control(tmp_path, inputs, None, Hard(top=2, pairs_per_record=2))
    swapped = control(tmp_path, inputs, "swapped", Hard(top=2, pairs_per_record=2))
    turned = {pair.record_id for pair in straight if is_swapped(pair.record_id)}
    assert 0 < len(turned) < len({pair.record_id for pair in straight})
    for before, after in zip(straight, swapped, strict=True):
        one, other = before, after
        if before.record_id in turned:
            assert (one.chosen, one.chosen_labels, one.chosen_scores) == (
                other.rejected, other.rejected_labels, other.rejected_scores
            )  # fmt: skip
            assert (one.rejected, one.rejected_labels) == (other.chosen, other.chosen_labels)
        else:
            assert (one.chosen, one.rejected) == (other.chosen, other.rejected)
        assert other.sampler == "hard, swapped"
        assert one.prompt == other.prompt


def test_half_of_many_records_are_swapped_by_their_ids_alone() -> None:
    share = sum(is_swapped(f"r{number}") for number in range(4000)) / 4000
    assert abs(share - 0.5) < 0.035
    assert [is_swapped(f"r{n}", seed=1) for n in range(99)] != [is_swapped(f"r{n}") for n in range(99)]


@pytest.mark.parametrize("sampler", [Hard(top=2, truth_first=True), Truth(top=2)])
def test_the_control_relabelled_gives_every_label_anothers_name(
    tmp_path: Path, inputs: tuple[Artifact, Artifact], sampler: AnySampler
) -> None:
    straight, renamed = (control(tmp_path, inputs, how, sampler) for how in (None, "relabelled"))
    new = rename_labels(IDS)
    assert sorted(new) == sorted(new.values()) == sorted(IDS)
    assert all(label != other for label, other in new.items())
    assert rename_labels(IDS[::-1]) == new
    task = build_task(RareDisease(), LABELS, 2)
    for before, after in zip(straight, renamed, strict=True):
        assert after.chosen_labels == [new[label] for label in before.chosen_labels]
        assert after.rejected_labels == [new[label] for label in before.rejected_labels]
        assert after.chosen[0].content == task.answer(after.chosen_labels)
        assert after.chosen_scores == before.chosen_scores
        assert after.sampler == f"{sampler.kind}, relabelled"


def test_one_label_cannot_be_renamed() -> None:
    with pytest.raises(UserError, match=r"^pair\.control: relabelled needs two labels"):
        rename_labels(["OMIM:1"])


def work(root: Path, inputs: tuple[Artifact, Artifact], pairs_per_part: int) -> tuple[Artifact, PairsPart]:
    """The first part of the scores, drawn here."""
    artifact = open_artifact(str(root), "pair", {}, {})
    config = Pair(sampler=Hard(top=2, pairs_per_record=3))
    actor = PairingActor(artifact, config, RareDisease(), LABELS, *inputs, {}, Knowledge(), pairs_per_part)
    part = ScoresPart(number=0, path="scores/part-00000.parquet", near=["records/part-00000.parquet"])
    return artifact, actor._work(part)


def read_pairs(artifact: Artifact, files: list[File]) -> list[list[PreferencePair]]:
    return [from_table(PreferencePair, read_part(artifact.file_uri(file.path))) for file in files]


def test_pairs_of_one_record_stay_in_one_part(tmp_path: Path, inputs: tuple[Artifact, Artifact]) -> None:
    artifact, made = work(tmp_path, inputs, pairs_per_part=4)
    ids = [[pair.record_id for pair in part] for part in read_pairs(artifact, made.files)]
    # r02 is for validation, r04 for the test
    assert ids == [["r00"] * 3 + ["r01"] * 3, ["r03"] * 3 + ["r05"] * 3, ["r02"] * 3]
    assert [file.path for file in made.files] == [
        "train/part-00000-000.parquet", "train/part-00000-001.parquet", "validation/part-00000-000.parquet"
    ]  # fmt: skip
    assert made.rankings == 6


def test_the_span_of_a_pair_is_the_note_of_its_task(tmp_path: Path, inputs: tuple[Artifact, Artifact]) -> None:
    artifact, made = work(tmp_path, inputs, pairs_per_part=2_000)
    task = build_task(RareDisease(), LABELS, 2)
    notes = {record.record_id: task.note(record) for record in RECORDS}
    pairs = [pair for part in read_pairs(artifact, made.files) for pair in part]
    assert {pair.record_id for pair in pairs} == {"r00", "r01", "r02", "r03", "r05"}
    for pair in pairs:
        assert pair.note_span is not None
        start, stop = pair.note_span
        assert pair.prompt[-1].role == "user"
        assert pair.prompt[-1].content[start:stop] == notes[pair.record_id]
        assert pair.prompt[-1].content[stop:].startswith("\n\nList the 2 most likely")


def test_pairs_carry_the_image_where_the_student_is_shown_it(tmp_path: Path) -> None:
    seen = [dataclasses.replace(record, image_uri=f"{record.record_id}.jpg") for record in RECORDS]
    inputs = write_inputs(tmp_path, [*seen[:3], *RECORDS[3:]], list(RANKINGS.values()))
    named = tuple(NamedLabel(label_id=label.label_id, name=label.name) for label in LABELS)
    for task, expected in (
        (ImageLabel(names=named), {"r00": "r00.jpg", "r01": "r01.jpg", "r02": "r02.jpg"}),
        (ImageLabel(names=named, told=("sex",), shows_image=False), dict.fromkeys(["r00", "r01", "r02", "r03", "r05"])),
    ):
        artifact = open_artifact(str(tmp_path), "pair", {"shows_image": task.shows_image}, {})
        config = Pair(sampler=Hard(top=2))
        actor = PairingActor(artifact, config, task, LABELS, *inputs, {}, Knowledge(), pairs_per_part=9)
        made = actor._work(ScoresPart(number=0, path="scores/part-00000.parquet", near=["records/part-00000.parquet"]))
        pairs = [pair for part in read_pairs(artifact, made.files) for pair in part]
        assert {pair.record_id: pair.image_uri for pair in pairs} == expected
        assert made.dropped == ({"no_image": 2} if task.shows_image else {})
        spans = {pair.record_id: pair.note_span for pair in pairs}
        assert set(map(str, spans.values())) == ({"None"} if task.shows_image else {"[0, 9]"})


def test_without_validation_there_is_its_table_and_no_confusion(ray_cluster: None, tmp_path: Path) -> None:
    train = [record for record in RECORDS if record.split == "train"]
    inputs = write_inputs(tmp_path, train, [RANKINGS[record.record_id] for record in train])
    made = draw(tmp_path, Hard(top=2), inputs)
    assert made.manifest.counts["pairs_validation"] == 0
    assert made.tables() == ["train", "validation"]
    with pytest.raises(
        UserError, match=r"^pair\.sampler: confusion counts what the teacher confuses on the validation"
    ):
        draw(tmp_path, Confusion(top=2), inputs)


def test_a_sampler_that_draws_nothing_is_named(ray_cluster: None, tmp_path: Path) -> None:
    gone = [
        TeacherScores(
            record_id=record.record_id, split=record.split, teacher="t", labels=IDS[:3], scores=[3.0, 2.0, 1.0]
        )
        for record in RECORDS
    ]
    inputs = write_inputs(tmp_path, RECORDS, gone)
    with pytest.raises(UserError, match=r"^pair\.sampler: hard drew no pair from 25 rankings$"):
        draw(tmp_path, Hard(top=2), inputs)


def test_siblings_need_labels_that_are_annotated(
    tmp_path: Path, inputs: tuple[Artifact, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "map_blocks", lambda *_, **__: pytest.fail("work was started"))
    expected = (
        r"^pair\.sampler: sibling needs labels .* they describe 0 of the task's 8, and not 'OMIM:1' \(Disease 1\)$"
    )
    with pytest.raises(UserError, match=expected):
        draw(tmp_path, Sibling(top=2), inputs)


def test_siblings_are_near_by_their_findings() -> None:
    names = {"OMIM:163950": "Noonan syndrome 1", "OMIM:151100": "LEOPARD syndrome 1", "OMIM:154700": "Marfan syndrome"}
    siblings = find_siblings([Label(label_id=label_id, name=name) for label_id, name in names.items()])
    assert list(siblings["OMIM:163950"]) == ["OMIM:151100", "OMIM:154700"]


def test_lists_must_fit_into_the_labels_unless_they_are_the_same() -> None:
    with pytest.raises(UserError, match="top 5 and bottom 5 need more labels than the task's 8"):
        check_lengths(Pair(sampler=Hard(top=5)), 8)
    check_lengths(Pair(sampler=Permuted(top=8)), 8)


def test_pairs_to_look_at_are_always_the_same_and_lie_apart(mixed: Artifact) -> None:
    rows = mixed.rows(PreferencePair, "train")
    shown = sample_pairs(mixed, 4)
    assert shown == sample_pairs(mixed, 4) == [rows[number * len(rows) // 4] for number in range(4)]
    assert sample_pairs(mixed, 1_000) == rows


def test_a_pair_is_told_with_its_answers_side_by_side() -> None:
    pair = PreferencePair(
        prompt=[Message(role="system", content="Answer."), Message(role="user", content="A boy.\n\nWhich?")],
        chosen=[Message(role="assistant", content="1. 'Noonan'\n2. 'Rett'")],
        rejected=[Message(role="assistant", content="1. 'Marfan'")],
        record_id="r7", split="train", teacher="ontology", sampler="hard", chosen_labels=["OMIM:1", "OMIM:2"],
        rejected_labels=["OMIM:3"], chosen_scores=[0.75, 0.5], rejected_scores=[-0.25], difficulty=0.125,
    )  # fmt: skip
    assert describe_pair(pair).splitlines() == [
        "--- r7: hard of ontology, difficulty 0.12",
        "[system] Answer.",
        "[user] A boy.",
        "",
        "Which?",
        "",
        "CHOSEN            |  REJECTED",
        "1. 'Noonan'       |  1. 'Marfan'",
        "2. 'Rett'         |",
        "teacher's score   |  teacher's score",
        "  0.7500  OMIM:1  |   -0.2500  OMIM:3",
        "  0.5000  OMIM:2  |",
    ]
    seen = describe_pair(dataclasses.replace(pair, image_uri="images/r7.jpg")).splitlines()
    assert seen[1:4] == ["[system] Answer.", "[image] images/r7.jpg", "[user] A boy."]
