from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from mint_ray.config.loader import UserError, from_data
from mint_ray.images import Frame
from mint_ray.teachers import Viewer, build_teacher
from mint_ray.teachers.config import Imported
from mint_ray.teachers.imported import ImportedTeacher, ImportedViewer
from tests.teachers.test_conformance import LABELS, RECORDS

PATH = "tests.teachers.longest:LongestName"


def test_its_identity_is_its_modules_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    source = "from tests.teachers.longest import LongestName\nclass Mine(LongestName):\n    pass\n"
    (tmp_path / "my_teachers.py").write_text(source)
    inputs = ImportedTeacher(Imported(path="my_teachers:Mine")).inputs()
    assert inputs == {"module": hashlib.sha256(source.encode()).hexdigest()}


def test_options_reach_the_class() -> None:
    teacher = ImportedTeacher(Imported(path=PATH, options={"step": 0.25}))
    teacher.fit(LABELS, RECORDS)
    assert teacher.score(RECORDS)[0].scores[0] == 0.25 * len("Holt-Oram syndrome")


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("none_such.module:Class", {}, "no module 'none_such', installed or on PYTHONPATH"),
        ("tests.teachers.none_such:Class", {}, "no module 'tests.teachers.none_such'"),
        ("needy_module:Class", {}, "needs 'none_such_either', which is not installed"),
        ("tests.teachers.longest:Shortest", {}, "tests.teachers.longest has no 'Shortest'"),
        ("tests.teachers.longest:NoScore", {}, "no method 'score'; a teacher has inputs, fit"),
        (PATH, {"stride": 2}, "options: tests.teachers.longest:LongestName: got an unexpected keyword argument 'stride'"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, options: dict[str, int], message: str
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "needy_module.py").write_text("import none_such_either\n")
    with pytest.raises(UserError) as caught:
        ImportedTeacher(Imported(path=path, options=options))
    assert message in str(caught.value)
    assert path in str(caught.value)


@pytest.mark.parametrize("path", ["package.module", "package.module:", ":Class", "a-b:Class", "a:b:c"])
def test_a_path_is_a_module_and_a_class(path: str) -> None:
    with pytest.raises(UserError, match=r"path must be package\.module:Class"):
        from_data(Imported, {"path": path})


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("fewer", "3 records went in, 2 came out"),
        ("record", "record 'r1': got the scores of 'someone' in train"),
        ("twice", "record 'r1': expected distinct labels with a score each, got 3 labels and 3 scores"),
        ("ascending", "record 'r1': expected scores that descend"),
        ("nan", "record 'r1': expected scores that descend"),
    ],
)
def test_a_ranking_that_is_none_is_named(fault: str, message: str) -> None:
    teacher = ImportedTeacher(Imported(path=PATH, options={"fault": fault}))
    teacher.fit(LABELS, RECORDS)
    with pytest.raises(UserError, match=message):
        teacher.score(RECORDS)


def test_a_class_that_looks_is_a_viewer_and_is_handed_its_images() -> None:
    teacher = build_teacher(Imported(path="tests.teachers.colours:Colours", options={"size": 4}))
    assert isinstance(teacher, Viewer)
    assert teacher.frame() == Frame(size=4)
    teacher.fit(LABELS, RECORDS)
    images = [np.full((4, 4, 3), colour, np.uint8) for colour in ([9, 5, 1], [1, 5, 9], [5, 9, 1])]
    first = [row.labels[0] for row in teacher.score_seen(RECORDS, images)]
    assert first == [LABELS[place].label_id for place in (0, 2, 1)]
    assert not isinstance(build_teacher(Imported(path=PATH)), Viewer)


def test_a_viewer_is_held_to_what_it_must_do() -> None:
    teacher = build_teacher(Imported(path="tests.teachers.colours:Colours", options={"size": 4}))
    assert isinstance(teacher, ImportedViewer)
    teacher.teacher.score_seen = lambda records, images: []
    with pytest.raises(UserError, match="3 records went in, 0 came out"):
        teacher.score_seen(RECORDS, [None] * 3)
    teacher.teacher.frame = lambda: 224
    with pytest.raises(UserError, match="frame: expected a Frame or None, got int"):
        teacher.frame()


def test_an_identity_that_is_empty_is_named() -> None:
    with pytest.raises(UserError, match="inputs: weights: expected text, got ''"):
        ImportedTeacher(Imported(path=PATH, options={"fault": "inputs"})).inputs()
