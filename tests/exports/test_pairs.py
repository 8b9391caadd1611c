"""Exports of pairs: files by split, targets and errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from mint_ray import storage
from mint_ray.artifacts import Artifact, open_artifact
from mint_ray.cli import cli
from mint_ray.config.loader import UserError
from mint_ray.exports import FORMATS, export_pairs
from tests.exports.samples import TRAIN, VALIDATION, write_pairs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write_pairs(tmp_path_factory.mktemp("pairs"), TRAIN, VALIDATION)


@pytest.mark.parametrize("form", FORMATS)
def test_a_split_without_pairs_gets_no_file(tmp_path: Path, form: str) -> None:
    artifact = write_pairs(tmp_path, TRAIN, [])
    assert export_pairs(artifact.uri, form, str(tmp_path / "to")) == {"train": 7}
    names = {path.name for path in (tmp_path / "to").iterdir()}
    assert names == {"train.jsonl"} | ({"dataset_info.json"} if form == "llamafactory" else set())


def test_a_target_that_is_not_empty_is_an_error(pairs: Artifact, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not empty, it contains .*mine\.txt"):
        export_pairs(pairs.uri, "trl", str(tmp_path))
    (tmp_path / "empty").mkdir()
    assert export_pairs(pairs.uri, "trl", str(tmp_path / "empty"))["train"] == 7


def test_only_finished_pairs_and_known_formats_are_exported(pairs: Artifact, tmp_path: Path) -> None:
    other = open_artifact(str(tmp_path), "score", {}, {})
    with other.write():
        pass
    for uri, form, message in (
        (other.uri, "trl", "expected a pair artifact, got a score artifact"),
        (str(tmp_path / "none"), "trl", r"none: no manifest\.json"),
        (pairs.uri, "alpaca", "format: got 'alpaca'; expected one of trl, ms-swift"),
    ):
        with pytest.raises(UserError, match=message):
            export_pairs(uri, form, str(tmp_path / "to"))


def test_the_command_prints_counts(pairs: Artifact, tmp_path: Path) -> None:
    to = str(tmp_path / "to")
    done = CliRunner().invoke(cli, ["export", pairs.uri, "--format", "ms-swift", "--to", to])
    assert done.output.splitlines() == ["train: 7", "validation: 2", f"ms-swift: {to}"]


@pytest.mark.s3
def test_pairs_are_exported_from_and_to_object_storage(s3_root: str) -> None:
    artifact = write_pairs(s3_root, TRAIN, VALIDATION)
    to = f"{s3_root}/to"
    export_pairs(artifact.uri, "llamafactory", to)
    assert [uri.removeprefix(to) for uri in storage.list_files(to)] == [
        "/dataset_info.json",
        "/train.jsonl",
        "/validation.jsonl",
    ]
    assert len(storage.read_bytes(f"{to}/train.jsonl").splitlines()) == 7
    with pytest.raises(UserError, match="not empty"):
        export_pairs(artifact.uri, "llamafactory", to)
