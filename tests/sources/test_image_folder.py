"""Records of folders of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mint_ray.config.loader import UserError, from_data
from mint_ray.images import Frame, read_image
from mint_ray.records import Record
from mint_ray.sources import BadRow, build_source
from mint_ray.sources.config import ImageFolder
from tests.test_images import picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("lung/TCGA-44-01A-x.png", "lung/TCGA-44-02B-x.PNG", "colon/deep/TCGA-55-01A-x.png"):
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture())
    return tmp_path / "root"


def read(folder: Path, **settings: Any) -> list[Record | BadRow]:
    return list(build_source(ImageFolder(uri=str(folder), **settings)).read())


def test_each_image_is_a_record_labelled_by_its_folder(folder: Path) -> None:
    assert read(folder) == [
        Record(record_id=name, group_id=name, label_id=name.split("/")[0], image_uri=f"{folder}/{name}")
        for name in ("colon/deep/TCGA-55-01A-x.png", "lung/TCGA-44-01A-x.png", "lung/TCGA-44-02B-x.PNG")
    ]
    assert build_source(ImageFolder(uri=str(folder))).labels() == {"colon": ["colon"], "lung": ["lung"]}


def test_image_uris_are_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    row = read(Path("root"))[0]
    monkeypatch.chdir("/")
    assert isinstance(row, Record)
    assert read_image(str(row.image_uri), Frame(size=8)).shape == (8, 8, 3)


@pytest.mark.parametrize(("group", "expected"), [("^.{7}", ["TCGA-55", "TCGA-44", "TCGA-44"]),
                                                 (r"-(\d\d)-", ["55", "44", "44"])])  # fmt: skip
def test_a_group_is_found_in_the_file_name(folder: Path, group: str, expected: list[str]) -> None:
    assert [row.group_id for row in read(folder, group_pattern=group) if isinstance(row, Record)] == expected


def test_a_file_that_is_not_a_labelled_image_is_a_bad_row_with_its_reason(folder: Path) -> None:
    for name in ("loose.png", "lung/notes.txt", "lung/other.png", "lung/.DS_Store"):
        (folder / name).write_bytes(b"x")
    rows = read(folder, group_pattern="TCGA-..")
    assert {row.location: row.reason for row in rows if isinstance(row, BadRow)} == {
        f"{folder}/loose.png": "no_label",
        f"{folder}/lung/notes.txt": "no_image",
        f"{folder}/lung/other.png": "no_group",
    }
    assert len(rows) == 6


def test_its_identity_changes_with_a_name_or_a_size(folder: Path) -> None:
    def identity() -> dict[str, str]:
        return build_source(ImageFolder(uri=str(folder))).inputs()

    first = identity()
    assert list(first) == [str(folder)]
    assert identity() == first
    (folder / "lung" / "TCGA-44-01A-x.png").write_bytes(picture(100, 100))
    second = identity()
    assert second != first
    (folder / "lung" / "TCGA-44-01A-x.png").rename(folder / "colon" / "TCGA-44-01A-x.png")
    assert identity() not in (first, second)


def test_a_missing_folder_and_an_invalid_pattern_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        read(tmp_path / "none")
    with pytest.raises(UserError, match=r"group_pattern: .* is not a regular expression"):
        from_data(ImageFolder, {"kind": "image_folder", "uri": "x", "group_pattern": "("})
