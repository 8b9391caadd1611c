"""Which students are refused before anything is loaded, and what identifies the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mint_ray.config.loader import UserError
from mint_ray.students import Student, check_student, resolve_path, student_revision
from tests.tiny import save_tiny_student

COMMIT = "0123456789abcdef0123456789abcdef01234567"

ASK = """
import sys
from mint_ray.config.loader import UserError
from mint_ray.students import Student, check_student, resolve_path, student_revision
config = Student(model_id=sys.argv[1])
try:
    check_student(config)
except UserError as error:
    print(error)
print(student_revision(config), resolve_path(config))
"""


def ask_the_hub(model_id: str, home: Path, **environment: str) -> list[str]:
    """Check a hub model in a process of its own, since the hub's library reads its settings once; the lines printed."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", ASK, model_id],
        env={**clean, "HF_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_a_complete_folder_is_accepted_and_used_as_it_is(tmp_path: Path) -> None:
    student = Student(model_id=str(save_tiny_student(tmp_path)))
    check_student(student)
    assert resolve_path(student) == str(tmp_path)


@pytest.mark.parametrize(
    ("lost", "complaint"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no model.safetensors"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_a_folder_without_one_of_its_parts_is_refused(tmp_path: Path, lost: str, complaint: str) -> None:
    (save_tiny_student(tmp_path) / lost).unlink()
    with pytest.raises(UserError, match=complaint):
        check_student(Student(model_id=str(tmp_path)))


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder = save_tiny_student(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only safetensors are read, found pytorch_model\.bin"):
        check_student(Student(model_id=str(folder)))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = save_tiny_student(tmp_path)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors is missing \(1 of 2"):
        check_student(Student(model_id=str(folder)))


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        check_student(Student(model_id=str(tmp_path / "nowhere")))


def test_a_folder_is_identified_by_its_files(tmp_path: Path) -> None:
    student = Student(model_id=str(save_tiny_student(tmp_path)))
    first = student_revision(student)
    assert student_revision(student) == first
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    second = student_revision(student)
    (tmp_path / "config.json").rename(tmp_path / "other.json")
    assert len({first, second, student_revision(student)}) == 3


def test_a_pinned_commit_is_the_revision() -> None:
    assert student_revision(Student(model_id="owner/name", revision=COMMIT)) == COMMIT


def test_a_hub_model_that_is_not_cached_is_refused_offline_in_one_line(tmp_path: Path) -> None:
    lines = ask_the_hub("owner/name", tmp_path, HF_HUB_OFFLINE="1")
    assert lines == [
        "model_id: owner/name: not in the local cache, and HF_HUB_OFFLINE forbids to ask the hub",
        "main owner/name",
    ]


def test_a_hub_that_does_not_answer_is_told_within_seconds(tmp_path: Path) -> None:
    started = time.monotonic()
    refusal, _ = ask_the_hub("owner/name", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert "the hub cannot be reached" in refusal
    assert time.monotonic() - started < 15


def test_a_cached_hub_model_is_read_from_its_commit_without_network(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = save_tiny_student(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    assert ask_the_hub("owner/name", tmp_path, HF_HUB_OFFLINE="1") == [f"{COMMIT} {snapshot}"]


def test_text_that_can_be_no_hub_id_is_refused(tmp_path: Path) -> None:
    lines = ask_the_hub("no such model", tmp_path, HF_HUB_OFFLINE="1")
    assert lines[0] == "model_id: no such model: neither a folder nor a hub id"
