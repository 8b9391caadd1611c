from __future__ import annotations

import json
from pathlib import Path

import pytest

from mint_ray.artifacts import Artifact, open_artifact, verify
from mint_ray.loading import UserError
from mint_ray.records import Label


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
    assert list(tmp_path.iterdir()) == []


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
