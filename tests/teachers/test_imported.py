"""A user's class is loaded by its path, and its results are checked."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from mint_ray.config.loader import UserError, from_data
from mint_ray.images import Frame
from mint_ray.teachers import ImageTeacher, build_teacher
from mint_ray.teachers.config import Imported
from mint_ray.teachers.imported import ImportedImageTeacher, ImportedTeacher
from tests.teachers.conformance import LABELS, RECORDS

PATH = "tests.teachers.longest_name:LongestNameTeacher"


def test_the_identity_is_the_sha256_of_the_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    source = "from tests.teachers.longest_name import LongestNameTeacher\nclass Mine(LongestNameTeacher):\n    pass\n"
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
        ("tests.teachers.longest_name:Shortest", {}, "tests.teachers.longest_name has no 'Shortest'"),
        ("tests.teachers.longest_name:NoScore", {}, "no method 'score'; a teacher has inputs, fit"),
        (PATH, {"stride": 2}, "options: tests.teachers.longest_name:LongestNameTeacher: got an unexpected keyword argument 'stride'"),
    ],
)  # fmt: skip
def test_a_missing_module_class_method_or_option_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, options: dict[str, int], message: str
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "needy_module.py").write_text("import none_such_either\n")
    with pytest.raises(UserError) as caught:
        ImportedTeacher(Imported(path=path, options=options))
    assert message in str(caught.value)
    assert path in str(caught.value)


@pytest.mark.parametrize("path", ["package.module", "package.module:", ":Class", "a-b:Class", "a:b:c"])
def test_a_path_that_is_no_module_and_class_is_an_error(path: str) -> None:
    with pytest.raises(UserError, match=r"path must be package\.module:Class"):
        from_data(Imported, {"path": path})


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("fewer", "score: expected 3 rankings, got 2"),
        ("record", "record 'r1': got the scores of 'other' in train"),
        ("duplicate", "record 'r1': expected distinct labels with a score each, got 3 labels and 3 scores"),
        ("ascending", "record 'r1': expected descending scores"),
        ("nan", "record 'r1': expected descending scores"),
    ],
)
def test_an_invalid_ranking_is_named(fault: str, message: str) -> None:
    teacher = ImportedTeacher(Imported(path=PATH, options={"fault": fault}))
    teacher.fit(LABELS, RECORDS)
    with pytest.raises(UserError, match=message):
        teacher.score(RECORDS)


def test_a_class_with_the_methods_of_an_image_teacher_gets_decoded_images() -> None:
    teacher = build_teacher(Imported(path="tests.teachers.color_teacher:ColorTeacher", options={"size": 4}))
    assert isinstance(teacher, ImageTeacher)
    assert teacher.frame() == Frame(size=4)
    teacher.fit(LABELS, RECORDS)
    images = [np.full((4, 4, 3), color, np.uint8) for color in ([9, 5, 1], [1, 5, 9], [5, 9, 1])]
    first = [row.labels[0] for row in teacher.score_images(RECORDS, images)]
    assert first == [LABELS[index].label_id for index in (0, 2, 1)]
    assert not isinstance(build_teacher(Imported(path=PATH)), ImageTeacher)


def test_the_results_of_an_image_teacher_are_checked() -> None:
    teacher = build_teacher(Imported(path="tests.teachers.color_teacher:ColorTeacher", options={"size": 4}))
    assert isinstance(teacher, ImportedImageTeacher)
    teacher.teacher.score_images = lambda records, images: []
    with pytest.raises(UserError, match="expected 3 rankings, got 0"):
        teacher.score_images(RECORDS, [None] * 3)
    teacher.teacher.frame = lambda: 224
    with pytest.raises(UserError, match="frame: expected a Frame or None, got int"):
        teacher.frame()


def test_an_empty_identity_is_named() -> None:
    with pytest.raises(UserError, match="inputs: weights: expected a non-empty string, got ''"):
        ImportedTeacher(Imported(path=PATH, options={"fault": "inputs"})).inputs()
