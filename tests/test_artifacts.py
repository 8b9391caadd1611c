from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mint_ray import artifacts, storage
from mint_ray.artifacts import MANIFEST, RUNS, Artifact, File, open_artifact, read_part, verify
from mint_ray.config.loader import UserError
from mint_ray.records import Label, from_table
from mint_ray.runtime.goodput import JOURNAL


def finished(root: Path, value: int = 1) -> Artifact:
    artifact = open_artifact(str(root), "prepare", {"value": value}, {"file": "abc"})
    with artifact.write() as draft:
        draft.write_rows(
            Label, "labels", [Label(label_id="a", name="A"), Label(label_id="b", name="B", synonyms=["C"])]
        )
        draft.write_text("metrics.json", "{}")
        draft.counts["labels"] = 2
        draft.dropped["bad"] += 1
    return artifact


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = finished(tmp_path).rows(Label, "labels")
    assert rows == [Label(label_id="a", name="A"), Label(label_id="b", name="B", synonyms=["C"])]


def test_an_empty_table_keeps_its_schema(tmp_path: Path) -> None:
    artifact = open_artifact(str(tmp_path), "prepare", {}, {})
    with artifact.write() as draft:
        assert draft.write_rows(Label, "labels", []) == 0
    assert artifact.rows(Label, "labels") == []


def test_the_manifest_says_what_is_there_and_what_was_left_out(tmp_path: Path) -> None:
    manifest = finished(tmp_path).manifest
    assert (manifest.stage, manifest.counts, manifest.dropped) == ("prepare", {"labels": 2}, {"bad": 1})
    assert {file.path: file.rows for file in manifest.files} == {"labels/part-00000.parquet": 2, "metrics.json": None}
    assert manifest.versions["pyarrow"]
    assert manifest.inputs == {"file": "abc"}


def test_a_name_follows_config_and_inputs_but_not_resources(tmp_path: Path) -> None:
    def name(config: dict[str, object], inputs: dict[str, str]) -> str:
        return open_artifact(str(tmp_path), "score", config, inputs).name

    assert name({"a": 1, "resources": {"n": 1}}, {}) == name({"a": 1, "resources": {"n": 2}}, {})
    assert len({name({"a": 1}, {}), name({"a": 2}, {}), name({"a": 1}, {"x": "y"})}) == 3


def test_an_error_while_writing_leaves_nothing_behind(tmp_path: Path) -> None:
    artifact = open_artifact(str(tmp_path), "prepare", {}, {})
    with pytest.raises(RuntimeError), artifact.write() as draft:
        draft.write_text("half.txt", "half")
        raise RuntimeError
    assert not artifact.is_complete
    # but for the seconds that it took
    assert [path.name for path in tmp_path.iterdir()] == [JOURNAL]


def test_of_two_runs_of_one_spec_the_first_is_kept(tmp_path: Path) -> None:
    artifact = open_artifact(str(tmp_path), "prepare", {}, {})
    with artifact.write() as late:
        late.write_text("who.txt", "late")
        with open_artifact(str(tmp_path), "prepare", {}, {}).write() as early:
            early.write_text("who.txt", "early")
    assert (Path(artifact.uri) / "who.txt").read_text() == "early"
    assert verify(artifact.uri) == []


def test_verify_finds_what_was_changed_removed_or_added(tmp_path: Path) -> None:
    artifact = finished(tmp_path)
    folder = Path(artifact.uri)
    assert verify(artifact.uri) == []
    (folder / "metrics.json").write_text("[]")
    assert any("metrics.json: sha256" in problem for problem in verify(artifact.uri))
    (folder / "metrics.json").unlink()
    (folder / "more.txt").write_text("")
    assert set(verify(artifact.uri)) == {"metrics.json: missing", "more.txt: not in the manifest"}


def test_verify_recomputes_the_fingerprint(tmp_path: Path) -> None:
    artifact = finished(tmp_path)
    place = Path(artifact.uri) / "manifest.json"
    data = json.loads(place.read_text())
    data["config"]["value"] = 2
    place.write_text(json.dumps(data))
    assert "config and inputs give" in verify(artifact.uri)[0]


def test_a_folder_without_a_manifest_is_not_an_artifact(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not finished"):
        verify(str(tmp_path))


def labels(*names: str) -> list[Label]:
    return [Label(label_id=f"{number}:{name}", name=name) for number, name in enumerate(names)]


def write_in_place(artifact: Artifact, *names: str) -> None:
    """As a driver whose workers write `labels/part-00000-000.parquet` themselves."""
    with artifact.write() as draft:
        draft.placed.append(artifact.write_part("labels/part-00000-000.parquet", Label, labels(*names)))
        draft.write_text("notes/remark.txt", "staged")


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.s3)])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "disk" else str(request.getfixturevalue("s3_root"))


def test_what_workers_wrote_in_place_is_published_beside_what_was_staged(anywhere: str) -> None:
    artifact = open_artifact(anywhere, "tokenize", {}, {})
    write_in_place(artifact, "A", "B")
    assert artifact.rows(Label, "labels") == labels("A", "B")
    assert {file.path: file.rows for file in artifact.manifest.files} == {
        "labels/part-00000-000.parquet": 2,
        "notes/remark.txt": None,
    }
    assert verify(artifact.uri) == []


def test_a_part_written_again_is_the_same_file(tmp_path: Path) -> None:
    artifact = open_artifact(str(tmp_path), "tokenize", {}, {})
    first = artifact.write_part("labels/part-00000-000.parquet", Label, labels("A", "B"))
    assert artifact.write_part("labels/part-00000-000.parquet", Label, labels("A", "B")) == first
    assert artifact.write_part("labels/part-00000-000.parquet", Label, labels("A", "C")).sha256 != first.sha256


def test_parts_without_a_manifest_are_not_an_artifact_and_go_when_a_later_run_publishes(anywhere: str) -> None:
    artifact = open_artifact(anywhere, "tokenize", {}, {})
    with pytest.raises(RuntimeError), artifact.write() as draft:
        for part in range(3):
            draft.placed.append(artifact.write_part(f"labels/part-{part:05d}-000.parquet", Label, labels("dead")))
        raise RuntimeError
    assert not artifact.is_complete
    write_in_place(artifact, "A")
    assert artifact.rows(Label, "labels") == labels("A")
    assert verify(artifact.uri) == []


def test_a_run_that_comes_late_changes_nothing_that_is_published(anywhere: str) -> None:
    artifact = open_artifact(anywhere, "tokenize", {}, {})
    with artifact.write() as late:
        late.placed.append(artifact.write_part("labels/part-00000-000.parquet", Label, labels("A")))
        write_in_place(open_artifact(anywhere, "tokenize", {}, {}), "A")
        published = storage.read_bytes(artifact.file_uri(MANIFEST))
    assert storage.read_bytes(artifact.file_uri(MANIFEST)) == published
    assert verify(artifact.uri) == []


def test_rows_that_belong_together_share_a_part(tmp_path: Path) -> None:
    artifact = open_artifact(str(tmp_path), "pair", {}, {})
    rows = [Label(label_id=key, name=str(number)) for number, key in enumerate("aaabbcddddde")]
    with artifact.write() as draft:
        count = draft.write_rows(Label, "labels", rows, rows_per_part=4, together=lambda label: label.label_id)
    assert count == len(rows)
    parts = [from_table(Label, read_part(artifact.file_uri(file.path))) for file in artifact.table_files("labels")]
    assert ["".join(label.label_id for label in part) for part in parts] == ["aaabb", "cddddd", "e"]
    assert artifact.rows(Label, "labels") == rows


def test_parts_have_the_length_asked_for(tmp_path: Path) -> None:
    artifact = open_artifact(str(tmp_path), "pair", {}, {})
    with artifact.write() as draft:
        draft.write_rows(Label, "labels", labels(*"abcdefgh"), rows_per_part=4)
        draft.write_rows(Label, "more", labels(*"abcdefghi"), rows_per_part=4)
    assert [file.rows for file in artifact.table_files("labels")] == [4, 4]
    assert [file.rows for file in artifact.table_files("more")] == [4, 4, 1]


def test_of_two_that_publish_at_the_same_moment_one_wins_and_the_other_says_so(
    anywhere: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = open_artifact(anywhere, "tokenize", {}, {})
    write_in_place(artifact, "A")
    published = storage.read_bytes(artifact.file_uri(MANIFEST))
    # as if the other had published just after it was looked for; were the manifests equal, nobody would have lost
    monkeypatch.setattr(Artifact, "is_complete", False)
    monkeypatch.setattr(artifacts, "git_revision", lambda: "another")
    with caplog.at_level("INFO"):
        write_in_place(artifact, "A")
    assert storage.read_bytes(artifact.file_uri(MANIFEST)) == published
    assert f"another run has published {artifact.name}; going on with that" in caplog.text
    assert verify(artifact.uri) == []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    path: str
    files: list[File]


def test_a_part_is_finished_when_its_record_is_there_and_its_files_too(anywhere: str) -> None:
    artifact = open_artifact(anywhere, "tokenize", {}, {})
    path = "labels/part-00000.parquet"
    assert artifact.finished_part(path, Made) is None
    made = Made(path=path, files=[artifact.write_part(path, Label, labels("A"))])
    assert artifact.finished_part(path, Made) is None
    artifact.finish_part(path, made)
    assert artifact.finished_part(path, Made) == made
    assert artifact.finished_part("labels/part-00001.parquet", Made) is None
    storage.write_bytes(artifact.file_uri(path), b"cut off")
    assert artifact.finished_part(path, Made) is None


def test_a_record_that_another_version_left_is_none(tmp_path: Path) -> None:
    artifact = open_artifact(str(tmp_path), "tokenize", {}, {})
    for content in (b'{"files": [], "other": 1}', b"{", b'{"path": "a"}'):
        storage.write_bytes(storage.join(str(tmp_path), RUNS, artifact.name, "a.done.json"), content)
        assert artifact.finished_part("a", Made) is None


def test_publishing_removes_the_completion_records(anywhere: str) -> None:
    artifact = open_artifact(anywhere, "tokenize", {}, {})
    with artifact.write() as draft:
        made = Made(path="labels/part.parquet", files=[artifact.write_part("labels/part.parquet", Label, labels("A"))])
        artifact.finish_part(made.path, made)
        draft.placed += made.files
    assert [uri for uri in storage.list_files(anywhere) if RUNS in uri] == []


def test_who_writes_a_part_first_is_kept(anywhere: str) -> None:
    artifact = open_artifact(anywhere, "score", {}, {})
    first = artifact.write_part_once("labels/part.parquet", Label, labels("A", "B"))
    assert first[1] == labels("A", "B")
    assert artifact.write_part_once("labels/part.parquet", Label, labels("C")) == first
    assert artifact.write_part_once("labels/part.parquet", Label, labels("A", "B")) == first


def test_a_folder_is_written_in_place_with_what_lies_deeper(anywhere: str, tmp_path: Path) -> None:
    (tmp_path / "made" / "deep").mkdir(parents=True)
    (tmp_path / "made" / "config.json").write_text("{}")
    pq.write_table(pa.table({"x": [1, 2, 3]}), tmp_path / "made" / "deep" / "x.parquet")
    artifact = open_artifact(anywhere, "join", {}, {})
    with artifact.write() as draft:
        draft.placed += artifact.write_folder("student", tmp_path / "made")
    assert [(file.path, file.rows) for file in artifact.manifest.files] == [
        ("student/config.json", None), ("student/deep/x.parquet", 3),
    ]  # fmt: skip
    assert verify(artifact.uri) == []
    assert storage.read_bytes(artifact.file_uri("student/config.json")) == b"{}"
