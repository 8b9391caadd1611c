"""The conformance suite of the teachers: checks that every teacher must pass, on a small task.

A new teacher gives a function that builds it, unfitted; see mint_ray/teachers/README.md.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

from mint_ray.images import read_images
from mint_ray.records import Label, Phenotype, Record, Split
from mint_ray.teachers import FitReport, ImageTeacher, Teacher

LABELS = [
    Label(label_id="OMIM:154700", name="Marfan syndrome"),
    Label(label_id="OMIM:142900", name="Holt-Oram syndrome"),
    Label(label_id="OMIM:219700", name="Cystic fibrosis"),
]


def make_record(number: int, *terms: str, split: Split = "train") -> Record:
    """Return a record of the first label with these phenotypes; `!` marks an excluded one."""
    phenotypes = [Phenotype(id=term.lstrip("!"), label="", excluded=term.startswith("!")) for term in terms]
    return Record(
        record_id=f"r{number}", group_id=f"g{number}", label_id=LABELS[0].label_id, phenotypes=phenotypes, split=split
    )


RECORDS = [
    make_record(1, "HP:0001166", "HP:0001083"),  # arachnodactyly, ectopia lentis
    make_record(2, "HP:0001631", "HP:0009777", split="validation"),  # atrial septal defect, absent thumb
    make_record(3, "HP:0006538", "!HP:0001166", split="test"),  # recurrent bronchopulmonary infections
]


def fit_and_reload(build: Callable[[], Teacher], folder: Path) -> Teacher:
    """Fit a teacher, save it to a new folder and return a loaded one, which must give the same scores."""
    fitted = build()
    report = fitted.fit(LABELS, RECORDS)
    assert isinstance(report, FitReport)
    folder.mkdir()
    fitted.save(folder)
    loaded = build()
    loaded.load(folder)
    assert loaded.score(RECORDS) == fitted.score(RECORDS)
    return loaded


def check_order(teacher: Teacher) -> None:
    """Check that there is one row per record, in order."""
    rows = teacher.score(RECORDS)
    assert [(row.record_id, row.split) for row in rows] == [(row.record_id, row.split) for row in RECORDS]


def check_ranking(teacher: Teacher) -> None:
    """Check that every row ranks each label once, best score first, or has a reason for having no ranking."""
    rows = teacher.score(RECORDS)
    for row in rows:
        if row.status == "failed":
            assert row.reason
            assert row.labels == row.scores == []
            continue
        assert sorted(row.labels) == sorted(label.label_id for label in LABELS)
        assert row.scores == sorted(row.scores, reverse=True)
    assert any(row.status == "ok" for row in rows), [row.reason for row in rows]


def check_batches(teacher: Teacher) -> None:
    """Check that the scores of a record do not depend on its batch."""
    together = teacher.score(RECORDS)
    assert [teacher.score([record])[0] for record in RECORDS] == together
    assert teacher.score(RECORDS[::-1]) == together[::-1]


def check_pickling(teacher: Teacher) -> None:
    """Check that a pickled teacher gives the same scores."""
    assert pickle.loads(pickle.dumps(teacher)).score(RECORDS) == teacher.score(RECORDS)  # noqa: S301


def check_images(teacher: Teacher) -> None:
    """Check that an image teacher gives the same scores for decoded images."""
    if not isinstance(teacher, ImageTeacher):
        return
    frame = teacher.frame()
    if frame is not None:
        images = read_images([record.image_uri for record in RECORDS], frame)
        assert teacher.score_images(RECORDS, images) == teacher.score(RECORDS)


CHECKS = [check_order, check_ranking, check_batches, check_pickling, check_images]


def check_teacher(build: Callable[[], Teacher], folder: Path) -> None:
    """Run all checks on the teacher that `build` returns."""
    teacher = fit_and_reload(build, folder)
    for check in CHECKS:
        check(teacher)
