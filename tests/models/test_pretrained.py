"""Pretrained models by id: what is loaded, what identifies it, and what is rejected before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from mint_ray import storage
from mint_ray.config.loader import UserError
from mint_ray.models.bundled import BUNDLES
from mint_ray.models.pretrained import check_model, model_identity, resolve_model, takes_images
from tests.encoders import save_tiny_vit
from tests.tiny import save_tiny_student
from tests.vision_students import save_tiny_vlm

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclasses.dataclass(frozen=True)
class Reference:
    model_id: str
    revision: str | None = None


def test_a_folder_is_accepted_and_used_as_it_is(tmp_path: Path) -> None:
    student = Reference(str(save_tiny_student(tmp_path)))
    check_model(student)
    model = resolve_model(student, "student")
    assert (model.model_id, model.path) == (str(tmp_path), str(tmp_path))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no model.safetensors"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_a_folder_without_one_of_its_files_is_rejected(tmp_path: Path, missing: str, message: str) -> None:
    (save_tiny_student(tmp_path) / missing).unlink()
    with pytest.raises(UserError, match=message):
        check_model(Reference(str(tmp_path)))


def test_a_vision_language_model_without_a_processor_is_rejected(tmp_path: Path) -> None:
    student = Reference(str(save_tiny_vlm(tmp_path)))
    check_model(student)
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(UserError, match="no image processor"):
        check_model(student)


def test_pickled_weights_are_rejected(tmp_path: Path) -> None:
    folder = save_tiny_student(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only safetensors are read, found pytorch_model\.bin"):
        check_model(Reference(str(folder)))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = save_tiny_student(tmp_path)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors is missing \(1 of 2"):
        check_model(Reference(str(folder)))


@pytest.mark.parametrize("use", ["student", "vision", "other"])
def test_a_missing_folder_is_rejected(tmp_path: Path, use: str) -> None:
    reference = Reference(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no folder"):
        check_model(reference)
    with pytest.raises(UserError, match="no folder"):
        model_identity(reference, use)  # type: ignore[arg-type]


def test_a_students_folder_is_identified_by_names_sizes_and_times(tmp_path: Path) -> None:
    student = Reference(str(save_tiny_student(tmp_path)))
    first = model_identity(student, "student")
    assert model_identity(student, "student") == first
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    second = model_identity(student, "student")
    (tmp_path / "config.json").rename(tmp_path / "other.json")
    assert len({first, second, model_identity(student, "student")}) == 3


def test_another_folder_is_identified_by_the_contents_of_its_files(tmp_path: Path) -> None:
    encoder = Reference(str(save_tiny_vit(tmp_path)))
    first = model_identity(encoder, "vision")
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    (tmp_path / "notes.md").write_text("not part of the model")
    assert model_identity(encoder, "vision") == model_identity(encoder, "other") == first
    (tmp_path / "config.json").write_text("{}")
    assert model_identity(encoder, "vision") != first
    with pytest.raises(UserError, match="is a folder, which has no revisions"):
        model_identity(Reference(str(tmp_path), COMMIT), "vision")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no \.safetensors"):
        model_identity(encoder, "vision")


def test_a_bundled_model_is_identified_by_its_wheel() -> None:
    encoder = Reference("bundled:efficientnet-lite0")
    assert model_identity(encoder, "vision") == BUNDLES["efficientnet-lite0"].wheel_sha256
    with pytest.raises(UserError, match="no bundled model 'bundled:efficientnet-lite0'; bundled models: none here"):
        model_identity(encoder, "other")


def test_a_pinned_commit_is_the_identity() -> None:
    assert model_identity(Reference("owner/name", COMMIT), "student") == COMMIT
    assert model_identity(Reference("owner/name", COMMIT), "vision") == COMMIT


def test_only_a_student_may_be_on_the_hub_without_a_commit() -> None:
    with pytest.raises(UserError, match="a model on the Hub needs its commit as revision"):
        model_identity(Reference("owner/name"), "text")


def test_a_model_takes_images_if_its_config_says_so(tmp_path: Path) -> None:
    vlm, text = save_tiny_vlm(tmp_path / "vlm"), save_tiny_student(tmp_path / "text")
    assert takes_images(resolve_model(Reference(str(vlm)), "student"))
    assert not takes_images(resolve_model(Reference(str(text)), "student"))


@pytest.mark.s3
def test_a_stored_model_is_downloaded_once(tmp_path: Path, s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINT_RAY_CACHE", str(tmp_path / "cache"))
    folder, uri = save_tiny_student(tmp_path / "student"), f"{s3_root}/build_vlm-0/student"
    for path in folder.iterdir():
        storage.upload(str(path), f"{uri}/{path.name}")
    check_model(Reference(uri))
    copy = Path(resolve_model(Reference(uri), "student").path)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }
    before = (copy / "config.json").stat().st_mtime_ns
    assert Path(resolve_model(Reference(uri), "student").path) == copy
    assert (copy / "config.json").stat().st_mtime_ns == before
    assert [path.name for path in (tmp_path / "cache" / "stored").iterdir()] == [copy.name]


@pytest.mark.s3
def test_a_stored_model_is_identified_by_names_and_sizes(s3_root: str) -> None:
    reference = Reference(f"{s3_root}/a")
    storage.write_bytes(f"{s3_root}/a/config.json", b"{}")
    first = model_identity(reference, "student")
    assert model_identity(reference, "student") == first
    storage.write_bytes(f"{s3_root}/a/config.json", b"{ }")
    assert model_identity(reference, "student") != first


@pytest.mark.s3
def test_a_missing_stored_model_is_rejected(s3_root: str) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        resolve_model(Reference(f"{s3_root}/none"), "student")
