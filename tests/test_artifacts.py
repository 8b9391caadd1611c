"""Outputs of stages: rows come back, the manifest is published last and once, parts are completed once."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mint_ray import artifacts, storage
from mint_ray.artifacts import MANIFEST, RUNS, Artifact, PartResult, find_artifact, open_artifact, verify
from mint_ray.config.loader import UserError
from mint_ray.config.stages import Score, ScoreResources
from mint_ray.records import Label
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


def test_the_manifest_lists_files_counts_and_dropped_rows(tmp_path: Path) -> None:
    manifest = finished(tmp_path).manifest
    assert (manifest.stage, manifest.counts, manifest.dropped) == ("prepare", {"labels": 2}, {"bad": 1})
    assert {file.path: file.rows for file in manifest.files} == {"labels/part-00000.parquet": 2, "metrics.json": None}
    assert manifest.versions["pyarrow"]
    assert manifest.inputs == {"file": "abc"}


def test_a_name_follows_config_and_inputs_but_not_resources(tmp_path: Path) -> None:
    def score(actors: int, **options: object) -> Artifact:
        config = Score(resources=ScoreResources(actors=actors))
        return open_artifact(str(tmp_path), "score", {"score": config, "options": options}, {})

    def name(config: dict[str, object], inputs: dict[str, str]) -> str:
        return open_artifact(str(tmp_path), "score", config, inputs).name

    assert score(1) == score(2)
    assert score(1).name == score(2).name
    # an option of the user that has this name counts
    assert score(1, resources=1).name != score(1, resources=2).name
    assert len({name({"a": 1}, {}), name({"a": 2}, {}), name({"a": 1}, {"x": "y"})}) == 3


def test_the_manifest_has_the_resources_beside_the_config_and_the_artifact_is_found_again(tmp_path: Path) -> None:
    config = Score(resources=ScoreResources(actors=3))
    artifact = open_artifact(str(tmp_path), "score", {"score": config}, {})
    with artifact.write() as draft:
        draft.write_text("x", "")
    assert artifact.manifest.resources["score.resources"]["actors"] == 3
    assert "resources" not in artifact.manifest.config["score"]
    found = find_artifact(artifact.uri, "score")
    assert (found, found.resources) == (artifact, artifact.resources)
    assert verify(artifact.uri) == []


def test_an_artifact_of_another_format_is_named_so(tmp_path: Path) -> None:
    artifact = finished(tmp_path)
    manifest = Path(artifact.uri) / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 5}))
    assert verify(artifact.uri) == [f"{artifact.uri}: format 5; this version reads and writes format 6"]


def test_an_error_while_writing_leaves_nothing_behind(tmp_path: Path) -> None:
    artifact = open_artifact(str(tmp_path), "prepare", {}, {})
    with pytest.raises(RuntimeError), artifact.write() as draft:
        draft.write_text("half.txt", "half")
        raise RuntimeError
    assert not artifact.is_complete
    # except for the journal of the attempt
    assert [path.name for path in tmp_path.iterdir()] == [JOURNAL]


def test_if_two_runs_of_one_spec_publish_the_first_one_wins(tmp_path: Path) -> None:
    artifact = open_artifact(str(tmp_path), "prepare", {}, {})
    with artifact.write() as late:
        late.write_text("who.txt", "late")
        with open_artifact(str(tmp_path), "prepare", {}, {}).write() as early:
            early.write_text("who.txt", "early")
    assert (Path(artifact.uri) / "who.txt").read_text() == "early"
    assert verify(artifact.uri) == []


def test_verify_finds_changed_missing_and_additional_files(tmp_path: Path) -> None:
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
    manifest = Path(artifact.uri) / MANIFEST
    data = json.loads(manifest.read_text())
    data["config"]["value"] = 2
    manifest.write_text(json.dumps(data))
    assert "config and inputs give" in verify(artifact.uri)[0]


def test_a_folder_without_a_manifest_is_not_an_artifact(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not complete"):
        verify(str(tmp_path))


def labels(*names: str) -> list[Label]:
    return [Label(label_id=f"{number}:{name}", name=name) for number, name in enumerate(names)]


def write_in_place(artifact: Artifact, *names: str) -> None:
    """Publish an artifact as a driver does whose workers write `labels/part-00000-000.parquet` in place."""
    with artifact.write() as draft:
        draft.placed.append(artifact.write_part("labels/part-00000-000.parquet", Label, labels(*names)))
        draft.write_text("notes/remark.txt", "staged")


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.s3)])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "disk" else str(request.getfixturevalue("s3_root"))


def test_files_that_workers_wrote_in_place_are_published_with_the_staged_ones(anywhere: str) -> None:
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


def test_parts_without_a_manifest_are_no_artifact_and_are_removed_when_a_later_run_publishes(anywhere: str) -> None:
    artifact = open_artifact(anywhere, "tokenize", {}, {})
    with pytest.raises(RuntimeError), artifact.write() as draft:
        for part in range(3):
            draft.placed.append(artifact.write_part(f"labels/part-{part:05d}-000.parquet", Label, labels("dead")))
        raise RuntimeError
    assert not artifact.is_complete
    write_in_place(artifact, "A")
    assert artifact.rows(Label, "labels") == labels("A")
    assert verify(artifact.uri) == []


def test_a_late_run_changes_nothing_that_is_published(anywhere: str) -> None:
    artifact = open_artifact(anywhere, "tokenize", {}, {})
    with artifact.write() as late:
        late.placed.append(artifact.write_part("labels/part-00000-000.parquet", Label, labels("A")))
        write_in_place(open_artifact(anywhere, "tokenize", {}, {}), "A")
        published = storage.read_bytes(artifact.file_uri(MANIFEST))
    assert storage.read_bytes(artifact.file_uri(MANIFEST)) == published
    assert verify(artifact.uri) == []


def test_parts_have_the_length_asked_for(tmp_path: Path) -> None:
    artifact = open_artifact(str(tmp_path), "pair", {}, {})
    with artifact.write() as draft:
        draft.write_rows(Label, "labels", labels(*"abcdefgh"), rows_per_part=4)
        draft.write_rows(Label, "more", labels(*"abcdefghi"), rows_per_part=4)
    assert [file.rows for file in artifact.table_files("labels")] == [4, 4]
    assert [file.rows for file in artifact.table_files("more")] == [4, 4, 1]


def test_if_two_runs_publish_at_the_same_moment_one_wins_and_the_other_logs_it(
    anywhere: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = open_artifact(anywhere, "tokenize", {}, {})
    write_in_place(artifact, "A")
    published = storage.read_bytes(artifact.file_uri(MANIFEST))
    # as if the other run had published between the check and the write, with a different manifest
    monkeypatch.setattr(Artifact, "is_complete", False)
    monkeypatch.setattr(artifacts, "git_revision", lambda: "another")
    with caplog.at_level("INFO"):
        write_in_place(artifact, "A")
    assert storage.read_bytes(artifact.file_uri(MANIFEST)) == published
    assert f"another run has published {artifact.name}; using that" in caplog.text
    assert verify(artifact.uri) == []


def test_a_part_is_finished_if_it_has_its_completion_record_and_its_files(anywhere: str) -> None:
    artifact = open_artifact(anywhere, "tokenize", {}, {})
    path = "labels/part-00000.parquet"
    assert artifact.finished_part(path, PartResult) is None
    result = PartResult(path=path, rows=1, files=[artifact.write_part(path, Label, labels("A"))], counts={"labels": 1})
    assert artifact.finished_part(path, PartResult) is None
    artifact.finish_part(path, result)
    assert artifact.finished_part(path, PartResult) == result
    assert artifact.finished_part("labels/part-00001.parquet", PartResult) is None
    storage.write_bytes(artifact.file_uri(path), b"cut off")
    assert artifact.finished_part(path, PartResult) is None


def test_a_completion_record_of_another_version_is_ignored(tmp_path: Path) -> None:
    artifact = open_artifact(str(tmp_path), "tokenize", {}, {})
    for content in (b'{"files": [], "other": 1}', b"{", b'{"files": []}'):
        storage.write_bytes(storage.join(str(tmp_path), RUNS, artifact.name, "a.done.json"), content)
        assert artifact.finished_part("a", PartResult) is None


def test_publishing_removes_the_completion_records(anywhere: str) -> None:
    artifact = open_artifact(anywhere, "tokenize", {}, {})
    with artifact.write() as draft:
        path = "labels/part.parquet"
        result = PartResult(path=path, files=[artifact.write_part(path, Label, labels("A"))], dropped={"bad": 1})
        artifact.finish_part(path, result)
        draft.add_part(result)
    assert artifact.manifest.dropped == {"bad": 1}
    assert [uri for uri in storage.list_files(anywhere) if RUNS in uri] == []


def test_the_first_writer_of_a_part_wins(anywhere: str) -> None:
    artifact = open_artifact(anywhere, "score", {}, {})
    first = artifact.write_part_once("labels/part.parquet", Label, labels("A", "B"))
    assert first[1] == labels("A", "B")
    assert artifact.write_part_once("labels/part.parquet", Label, labels("C")) == first
    assert artifact.write_part_once("labels/part.parquet", Label, labels("A", "B")) == first


def test_a_folder_is_written_in_place_with_its_subfolders(anywhere: str, tmp_path: Path) -> None:
    (tmp_path / "made" / "deep").mkdir(parents=True)
    (tmp_path / "made" / "config.json").write_text("{}")
    pq.write_table(pa.table({"x": [1, 2, 3]}), tmp_path / "made" / "deep" / "x.parquet")
    artifact = open_artifact(anywhere, "build_vlm", {}, {})
    with artifact.write() as draft:
        draft.placed += artifact.write_folder("student", tmp_path / "made")
    assert [(file.path, file.rows) for file in artifact.manifest.files] == [
        ("student/config.json", None), ("student/deep/x.parquet", 3),
    ]  # fmt: skip
    assert verify(artifact.uri) == []
    assert storage.read_bytes(artifact.file_uri("student/config.json")) == b"{}"
