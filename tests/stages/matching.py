"""Images without texts and a source of texts, for the tests of `embed_texts` and `match_texts`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mint_ray.config.stages import MatchTexts, Prepare, Splits
from mint_ray.records import CandidateText
from mint_ray.sources.config import Table
from mint_ray.stages.embed_texts import select_texts
from mint_ray.stages.prepare import select_records
from mint_ray.tasks.config import ImageLabel, NamedLabel
from mint_ray.teachers.config import TwoTower
from tests.teachers.tiny_clip import SIZE

LABELS = ("mel", "nv", "bcc")
IMAGE_TASK = ImageLabel(
    names=tuple(NamedLabel(label_id=label, name=name) for label, name in zip(LABELS, ("a", "b", "c"), strict=True))
)
SPLITS = ("train", "train", "validation", "test")
NUM_IMAGES, NUM_TEXTS, ROWS_PER_PART = 16, 40, 6
BROKEN, MISSING, HAS_TEXT, NO_IMAGE = 3, 5, 8, 9


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def write_images(folder: Path, labels: Mapping[int, str] | None = None, name: str = "images.jsonl") -> Path:
    """Write sixteen records, of which one has a text, one no image, and two an image that cannot be read."""
    rows = []
    for number in range(NUM_IMAGES):
        image = folder / f"{number}.png"
        rng = np.random.default_rng(number)
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(image)
        if number == BROKEN:
            image.write_bytes(b"not an image")
        if number == MISSING:
            image.unlink()
        row: dict[str, Any] = {
            "record_id": f"r{number:02d}",
            "group_id": f"g{number}",
            "label_id": (labels or {}).get(number, LABELS[number % 3]),
            "split": SPLITS[number % 4],
            "image_uri": str(image),
        }
        if number == NO_IMAGE:
            del row["image_uri"]
        if number in (HAS_TEXT, NO_IMAGE):
            row["text"] = f"The own words of {number}."
        rows.append(row)
    return write_rows(folder / name, rows)


def write_texts(folder: Path, **more: str) -> Path:
    """Write forty texts of random words in groups of two, and further texts by id, as `texts.jsonl`."""
    words = ["dark", "pale", "round", "ragged", "large", "small", "blue", "flat", "raised"]
    rows = []
    for number in range(NUM_TEXTS):
        chosen = np.random.default_rng(2000 + number).permutation(words)[:5]
        rows.append({"record_id": f"t{number:02d}", "group_id": f"p{number // 2}", "text": " ".join(chosen)})
    more_rows = [{"record_id": key, "text": text} for key, text in more.items()]
    return write_rows(folder / "texts.jsonl", rows + more_rows)


def write_matching_data(folder: Path) -> Path:
    """Write images and texts; three of the texts are another spelling of t00, the text of a record, and no words."""
    write_images(folder)
    first = json.loads(write_texts(folder).read_text().split("\n")[0])["text"]
    write_texts(folder, t98=f" {first.upper()}! ", t97="the OWN words of 8", t99="...")
    return folder


def matching_config(data: Path, clip: Path, *, images: str = "images.jsonl", **settings: Any) -> Prepare:
    """Return settings that match the texts in the folder `data` to its images; `settings` are those of MatchTexts."""
    encoder = TwoTower(model_id=str(clip))
    return Prepare(
        source=Table(uri=str(data / images)),
        splits=Splits(validation=0.3, test=0.3),
        rows_per_part=ROWS_PER_PART,
        match_texts=MatchTexts(source=Table(uri=str(data / "texts.jsonl")), encoder=encoder, **settings),
    )


def with_source(config: Prepare, source: Table) -> Prepare:
    """Return the settings with another source of texts."""
    assert config.match_texts is not None
    return dataclasses.replace(config, match_texts=dataclasses.replace(config.match_texts, source=source))


def candidate_texts(data: Path, clip: Path) -> list[CandidateText]:
    """Return the texts that the records in the folder `data` can get."""
    config = matching_config(data, clip)
    return select_texts(config, select_records(config, IMAGE_TASK).records)[0]
