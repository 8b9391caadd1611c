from __future__ import annotations

from pathlib import Path

import pytest

from mint_ray import storage
from mint_ray.artifacts import open_artifact, verify
from mint_ray.loading import UserError
from mint_ray.records import Label


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "disk" else str(request.getfixturevalue("s3_root"))


def test_bytes_come_back_and_are_listed(root: str) -> None:
    storage.write_bytes(storage.join(root, "a", "b.txt"), b"hello")
    storage.write_bytes(storage.join(root, "a", "c.txt"), b"")
    assert storage.read_bytes(storage.join(root, "a/b.txt")) == b"hello"
    assert storage.list_files(storage.join(root, "a")) == [storage.join(root, "a/b.txt"), storage.join(root, "a/c.txt")]
    assert storage.list_files(storage.join(root, "a/b.txt")) == [storage.join(root, "a/b.txt")]
    expected = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    assert storage.sha256(storage.join(root, "a/b.txt")) == expected


def test_what_is_missing_is_named(root: str) -> None:
    with pytest.raises(UserError, match=r"nothing\.txt: no such file"):
        storage.read_bytes(storage.join(root, "nothing.txt"))
    with pytest.raises(UserError, match="nothing: no such file or folder"):
        storage.list_files(storage.join(root, "nothing"))


def test_a_folder_is_downloaded_and_deleted(root: str, tmp_path: Path) -> None:
    storage.write_bytes(storage.join(root, "d/e/f.bin"), b"\x00\x01")
    storage.download_folder(storage.join(root, "d"), str(tmp_path / "local"))
    assert (tmp_path / "local" / "e" / "f.bin").read_bytes() == b"\x00\x01"
    storage.delete_folder(storage.join(root, "d"))
    assert not storage.exists(storage.join(root, "d/e/f.bin"))


def test_an_artifact_is_written_read_and_verified(root: str) -> None:
    artifact = open_artifact(root, "prepare", {"a": 1}, {})
    assert not artifact.is_complete
    with artifact.write() as draft:
        draft.write_rows(Label, "labels", [Label(label_id="a", name="A")])
    assert artifact.is_complete
    assert artifact.rows(Label, "labels") == [Label(label_id="a", name="A")]
    assert verify(artifact.uri) == []
    storage.write_bytes(artifact.file_uri("labels/part-00000.parquet"), b"other")
    assert verify(artifact.uri) != []


def test_a_root_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        storage.check_writable(str(tmp_path / "file" / "below"))


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(UserError, match="unknown scheme 'ftp'"):
        storage.resolve("ftp://host/x")


@pytest.mark.s3
def test_a_bucket_that_refuses_is_named(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError, match="cannot be written"):
        storage.check_writable(s3_root)
