"""Files on a disk and on a real S3 server, also behind a proxy that injects faults."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mint_ray import storage
from mint_ray.artifacts import open_artifact, verify
from mint_ray.config.loader import UserError
from mint_ray.records import Label
from tests.faults.proxy import FAULTS, Fault, FaultProxy


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


def test_a_missing_file_or_folder_is_named(root: str) -> None:
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


WRONG_SETTINGS = [
    ("mint/", "nowhere/", {}, "does not exist"),
    ("mint/", "mint/", {"AWS_SECRET_ACCESS_KEY": "wrong"}, "signature"),
    ("mint/", "mint/", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "connect"),
]


@pytest.mark.s3
@pytest.mark.parametrize(
    ("there", "here", "environment", "message"), WRONG_SETTINGS, ids=["bucket", "secret", "endpoint"]
)
def test_an_error_of_a_bucket_is_one_line(
    s3_root: str, monkeypatch: pytest.MonkeyPatch, there: str, here: str, environment: dict[str, str], message: str
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    root = s3_root.replace(there, here)
    with pytest.raises(UserError, match=f"^{root}: cannot be written: ") as caught:
        storage.check_writable(root)
    assert "\n" not in str(caught.value)
    assert message in str(caught.value).lower()


def test_of_several_writers_of_a_file_one_succeeds(root: str) -> None:
    place = storage.join(root, "once", "file.txt")
    assert storage.creates_once(root)
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: storage.create_bytes(place, b"%d" % n, once=True), range(8)))
    assert storage.read_bytes(place) == b"%d" % won.index(True)
    assert sum(won) == 1
    assert storage.list_files(root) == [place]


def test_a_writer_that_finds_its_own_bytes_has_succeeded(root: str) -> None:
    place = storage.join(root, "once", "file.txt")
    assert storage.create_bytes(place, b"mine", once=True)
    assert storage.create_bytes(place, b"mine", once=True)
    assert not storage.create_bytes(place, b"other", once=True)


def test_a_store_without_conditional_writes_is_checked_first(root: str) -> None:
    place = storage.join(root, "looked", "file.txt")
    assert storage.create_bytes(place, b"mine", once=False)
    assert not storage.create_bytes(place, b"other", once=False)
    assert storage.read_bytes(place) == b"mine"


@pytest.fixture
def proxy(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The S3 server behind a proxy that injects faults."""
    proxy = FaultProxy(os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    yield proxy
    proxy.close()


@pytest.mark.s3
def test_a_store_that_ignores_conditions_is_detected(s3_root: str, proxy: FaultProxy) -> None:
    proxy.arm("accepted", 2, when=lambda method, path: method == "PUT")
    assert not storage.creates_once(s3_root)
    assert storage.creates_once(f"{s3_root}/other")


@pytest.mark.s3
@pytest.mark.parametrize("fault", FAULTS)
def test_reads_and_writes_survive_a_store_that_fails_for_a_while(s3_root: str, proxy: FaultProxy, fault: Fault) -> None:
    place, content = storage.join(s3_root, fault, "file"), os.urandom(100_000)
    operations: dict[str, Callable[[], object]] = {
        "write": lambda: storage.write_bytes(place, content),
        "create": lambda: storage.create_bytes(f"{place}-once", content, once=True),
        "read": lambda: storage.read_bytes(place) == content,
        "list": lambda: storage.list_files(storage.join(s3_root, fault)) == [place, f"{place}-once"],
        "size": lambda: storage.size(place) == len(content),
    }
    for name, operate in operations.items():
        proxy.arm(fault, 3)
        assert operate() in (None, True), name
        proxy.disarm()
        assert proxy.injected[fault] > 0, name
    assert storage.read_bytes(f"{place}-once") == content


@pytest.mark.s3
def test_a_client_has_no_quota_of_retries(s3_root: str, proxy: FaultProxy) -> None:
    # the standard strategy of the AWS SDK never retries again after a hundred
    place = storage.join(s3_root, "file")
    storage.write_bytes(place, b"content")
    for _ in range(60):
        proxy.arm("cut_before", 3)
        assert storage.read_bytes(place) == b"content"
    assert proxy.injected["cut_before"] > 150
