"""An ensemble averages the members' probabilities; its weights maximize the likelihood of the validation split."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from mint_ray.config.loader import UserError
from mint_ray.records import Record, TeacherScores
from mint_ray.teachers import teacher_inputs
from mint_ray.teachers.config import Ensemble, Imported, Member, Table
from mint_ray.teachers.ensemble import EnsembleTeacher, learn_weights
from tests.teachers.conformance import LABELS, RECORDS

IDS = [label.label_id for label in LABELS]


def table(path: Path, scores: dict[str, list[float]], labels: list[str] = IDS) -> Table:
    """Return a teacher that gives each record of `scores` these scores, in the order of `labels`."""
    rows = [
        f"{record},{label},{score}"
        for record, given in scores.items()
        for label, score in zip(labels, given, strict=True)
    ]
    path.write_text("\n".join(["record_id,label_id,score", *rows]) + "\n")
    return Table(uri=str(path))


def by_label(row: TeacherScores) -> dict[str, float]:
    return dict(zip(row.labels, row.scores, strict=True))


def test_a_score_is_the_weighted_mean_of_softmaxes_computed_by_hand(tmp_path: Path) -> None:
    one = Member(teacher=table(tmp_path / "1.csv", {"r1": [2.0, 1.0, 0.0]}), weight=3, temperature=0.5)
    two = Member(teacher=table(tmp_path / "2.csv", {"r1": [0.0, 5.0, 1.0]}), weight=1, temperature=2.0)
    teacher = EnsembleTeacher(Ensemble(members=(one, two)))
    teacher.fit(LABELS, RECORDS)
    row = teacher.score(RECORDS[:1])[0]
    first = [math.exp(score / 0.5) for score in (2, 1, 0)]
    second = [math.exp(score / 2) for score in (0, 5, 1)]
    for i, label in enumerate(IDS):
        expected = 0.75 * first[i] / sum(first) + 0.25 * second[i] / sum(second)
        assert by_label(row)[label] == pytest.approx(expected, rel=1e-12)
    assert sum(row.scores) == pytest.approx(1)


def test_agreement_is_the_share_of_members_with_the_same_first_label(tmp_path: Path) -> None:
    given = [[3.0, 1, 0], [2.0, 1, 0], [0, 4.0, 1]]
    members = tuple(Member(teacher=table(tmp_path / f"{i}.csv", {"r1": row})) for i, row in enumerate(given))
    teacher = EnsembleTeacher(Ensemble(members=members))
    teacher.fit(LABELS, RECORDS)
    row = teacher.score(RECORDS[:1])[0]
    assert row.labels[0] == IDS[0]
    assert row.agreement == pytest.approx(2 / 3)


def test_a_member_that_fails_on_a_record_is_left_out_and_named(tmp_path: Path) -> None:
    one = table(tmp_path / "1.csv", {"r1": [2.0, 1, 0], "r2": [2.0, 1, 0]})
    two = table(tmp_path / "2.csv", {"r1": [0.0, 1, 2]})
    teacher = EnsembleTeacher(Ensemble(members=(Member(teacher=one, weight=0.1), Member(teacher=two))))
    teacher.fit(LABELS, RECORDS)
    both, one_member, no_member = teacher.score(RECORDS)
    assert both.silent == []
    assert (one_member.status, one_member.silent, one_member.agreement) == ("ok", ["table 2: no_scores"], 1.0)
    odds = [math.exp(score) for score in (2, 1, 0)]
    assert one_member.scores == pytest.approx([odd / sum(odds) for odd in odds])
    assert (no_member.status, no_member.reason, no_member.labels) == ("failed", "every_member_failed", [])
    assert no_member.silent == ["table 1: no_scores", "table 2: no_scores"]


def test_a_label_that_a_member_does_not_rank_gets_an_equal_share(tmp_path: Path) -> None:
    two_labels = Member(teacher=table(tmp_path / "1.csv", {"r1": [1.0, 0.0]}, IDS[:2]), labels=tuple(IDS[:2]))
    all_labels = Member(teacher=table(tmp_path / "2.csv", {"r1": [0.0, 0.0, 0.0]}))
    teacher = EnsembleTeacher(Ensemble(members=(two_labels, all_labels)))
    teacher.fit(LABELS, RECORDS)
    found = by_label(teacher.score(RECORDS[:1])[0])
    share = math.e / (math.e + 1)
    expected = [(share * 2 / 3 + 1 / 3) / 2, ((1 - share) * 2 / 3 + 1 / 3) / 2, 1 / 3]
    assert [found[label] for label in IDS] == pytest.approx(expected)


def likelihood(probability_RM: np.ndarray, weights: tuple[float, ...]) -> float:
    """Return the mean log-likelihood, computed record by record."""
    total = 0.0
    for row in probability_RM:
        answered = [(weight, p) for weight, p in zip(weights, row, strict=True) if not math.isnan(p)]
        total += math.log(sum(weight * p for weight, p in answered) / sum(weight for weight, _ in answered))
    return total / len(probability_RM)


@pytest.mark.parametrize("failure_rate", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_learned_weights_are_at_least_as_likely_as_the_best_of_a_fine_grid(seed: int, failure_rate: float) -> None:
    rng = np.random.default_rng(seed)
    probability_RM = rng.beta(*rng.uniform(0.3, 3, size=(2, 3)), size=(40, 3))
    probability_RM[rng.random(probability_RM.shape) < failure_rate] = np.nan
    probability_RM = probability_RM[~np.isnan(probability_RM).all(axis=1)]
    learned = learn_weights(probability_RM)
    assert learned.sum() == pytest.approx(1)
    assert (learned > 0).all()
    steps = 60
    grid = (
        (a / steps, b / steps, 1 - (a + b) / steps)
        for a, b in itertools.product(range(1, steps), repeat=2)
        if a + b < steps
    )
    assert (
        likelihood(probability_RM, tuple(learned))
        >= max(likelihood(probability_RM, weights) for weights in grid) - 1e-6
    )
    assert (learn_weights(probability_RM) == learned).all()


def test_weights_are_learned_on_the_validation_split_alone(tmp_path: Path) -> None:
    splits = ["train"] * 4 + ["validation"] * 10 + ["test"] * 4
    records = [
        Record(record_id=f"v{i}", group_id=f"g{i}", label_id=IDS[i % 3], split=split)  # type: ignore[arg-type]
        for i, split in enumerate(splits)
    ]
    right = {r.record_id: [3.0 * (label == r.label_id) for label in IDS] for r in records}
    wrong = {r.record_id: [3.0 * (label != r.label_id) for label in IDS] for r in records}
    good = {r.record_id: (right if r.split == "validation" else wrong)[r.record_id] for r in records}
    bad = {r.record_id: (wrong if r.split == "validation" else right)[r.record_id] for r in records}
    members = (Member(teacher=table(tmp_path / "good.csv", good)), Member(teacher=table(tmp_path / "bad.csv", bad)))
    teacher = EnsembleTeacher(Ensemble(members=members, weights="learned"))
    report = teacher.fit(LABELS, records)
    assert teacher.weights_M[0] > 0.999
    assert report.counts["weight_records"] == 10
    assert report.counts["table 1: records_with_scores"] == len(records)


def test_weights_cannot_be_learned_without_validation_records(tmp_path: Path) -> None:
    member = Member(teacher=table(tmp_path / "1.csv", {"r1": [1.0, 0, 0]}))
    teacher = EnsembleTeacher(Ensemble(members=(member, member), weights="learned"))
    with pytest.raises(UserError, match="learned requires validation records"):
        teacher.fit(LABELS, RECORDS)


def test_a_label_that_the_task_lacks_is_named(tmp_path: Path) -> None:
    member = Member(teacher=table(tmp_path / "1.csv", {"r1": [1.0, 0, 0]}))
    wrong = Member(teacher=member.teacher, labels=("OMIM:1",))
    with pytest.raises(UserError, match=r"members\.1\.labels: 'OMIM:1' is not one of the task's 3 labels"):
        EnsembleTeacher(Ensemble(members=(member, wrong))).fit(LABELS, RECORDS)


def test_members_can_be_ensembles_and_each_has_an_identity(tmp_path: Path) -> None:
    member = Member(teacher=table(tmp_path / "1.csv", {"r1": [1.0, 0, 0]}))
    user = Member(teacher=Imported(path="tests.teachers.longest_name:LongestNameTeacher"))
    nested = Ensemble(members=(Member(teacher=Ensemble(members=(member, user))), user))
    teacher = EnsembleTeacher(nested)
    assert sorted(teacher_inputs(nested)) == [
        "ensemble 1: import 2: module",
        "ensemble 1: table 1: scores",
        "import 2: module",
    ]
    teacher.fit(LABELS, RECORDS)
    assert teacher.score(RECORDS)[0].labels[0] == "OMIM:142900"
