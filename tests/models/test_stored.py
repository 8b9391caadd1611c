"""Students that lie in object storage."""

from __future__ import annotations

from pathlib import Path

import pytest

from mint_ray import storage
from mint_ray.config.loader import UserError
from mint_ray.models.stored import stored_folder, stored_revision
from mint_ray.students import Student, check_student, load_tokenizer, resolve_path, student_revision
from tests.tiny import save_tiny_student

pytestmark = pytest.mark.s3


def test_a_stored_student_is_fetched_once_and_loads(
    tmp_path: Path, s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINT_RAY_CACHE", str(tmp_path / "cache"))
    folder, uri = save_tiny_student(tmp_path / "student"), f"{s3_root}/join-0/student"
    for path in folder.iterdir():
        storage.upload(str(path), f"{uri}/{path.name}")
    student = Student(model_id=uri)
    check_student(student)
    there = Path(resolve_path(student))
    assert {path.name: path.read_bytes() for path in there.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }
    assert len(load_tokenizer(student)) == len(load_tokenizer(Student(model_id=str(folder))))
    before = (there / "config.json").stat().st_mtime_ns
    assert Path(resolve_path(student)) == there
    assert (there / "config.json").stat().st_mtime_ns == before
    assert [path.name for path in (tmp_path / "cache" / "stored").iterdir()] == [there.name]


def test_its_identity_is_the_same_on_every_machine_and_changes_with_its_files(s3_root: str) -> None:
    storage.write_bytes(f"{s3_root}/a/config.json", b"{}")
    first = student_revision(Student(model_id=f"{s3_root}/a"))
    assert first == stored_revision(f"{s3_root}/a")
    storage.write_bytes(f"{s3_root}/a/config.json", b"{ }")
    assert stored_revision(f"{s3_root}/a") != first


def test_a_student_that_is_not_there_is_an_error_of_the_user(s3_root: str) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        stored_folder(f"{s3_root}/none")
