"""Export preference pairs as JSONL files for other trainers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mint_ray import storage
from mint_ray.artifacts import Manifest, read_manifest, read_part
from mint_ray.config.loader import UserError
from mint_ray.exports.formats import FORMATS
from mint_ray.records import PreferencePair, from_table

SPLITS = ("train", "validation")
DATASET_INFO = "dataset_info.json"
"""Index of data sets that LLaMA-Factory reads."""


def export_pairs(uri: str, form: str, to: str) -> dict[str, int]:
    """Write one JSONL file per split that has pairs; return the number of pairs by split.

    `llamafactory` also writes `dataset_info.json`, in which the files are registered. Nothing is written to the target
    before every pair has been read.

    Args:
        uri: URI of a pair artifact.
        form: One of FORMATS.
        to: URI of a new or empty folder.

    Raises:
        UserError: The format is unknown, the artifact contains no pairs, the target is not empty, or a pair cannot be
            represented in the format.
    """
    if form not in FORMATS:
        raise UserError(f"format: got {form!r}; expected one of {', '.join(FORMATS)}")
    manifest = read_manifest(uri)
    if manifest.stage != "pair":
        raise UserError(f"{uri}: expected a pair artifact, got a {manifest.stage} artifact")
    check_empty(to)
    counts, has_images = {}, False
    with tempfile.TemporaryDirectory(prefix="mint-ray-") as folder:
        for split in SPLITS:
            count, with_images = _write_split(uri, manifest, split, FORMATS[form], Path(folder))
            if count:
                counts[split] = count
            has_images |= with_images
        if form == "llamafactory":
            (Path(folder) / DATASET_INFO).write_text(json.dumps(_dataset_info(list(counts), has_images), indent=2))
        # the index is uploaded after the files that it refers to
        for path in sorted(Path(folder).iterdir(), key=lambda path: (path.name == DATASET_INFO, path.name)):
            storage.upload(str(path), storage.join(to, path.name))
    return counts


def check_empty(to: str) -> None:
    """Raise UserError if the target of an export contains files."""
    if storage.exists(to) and (found := storage.list_files(to)):
        raise UserError(f"{to}: not empty, it contains {found[0]}")


def _write_split(
    uri: str, manifest: Manifest, split: str, to_row: Callable[[PreferencePair], dict[str, Any]], folder: Path
) -> tuple[int, bool]:
    """Write the pairs of one split; return their number and whether any of them has an image."""
    # JSON readers reject a file without a line
    if not any(file.rows for file in manifest.files if file.path.startswith(f"{split}/")):
        return 0, False
    count, has_images = 0, False
    with (folder / f"{split}.jsonl").open("w", encoding="utf-8", newline="\n") as lines:
        for pair in _pairs(uri, manifest, split):
            lines.write(json.dumps(to_row(pair), ensure_ascii=False) + "\n")
            count += 1
            has_images |= pair.image_uri is not None
    return count, has_images


def _pairs(uri: str, manifest: Manifest, split: str) -> Iterator[PreferencePair]:
    for file in manifest.files:
        if file.path.startswith(f"{split}/"):
            yield from from_table(PreferencePair, read_part(storage.join(uri, file.path)))


def _dataset_info(splits: list[str], has_images: bool) -> dict[str, Any]:
    columns = {"messages": "conversations", "system": "system", "chosen": "chosen", "rejected": "rejected"}
    if has_images:
        columns["images"] = "images"
    return {
        f"mint_ray_{split}": {
            "file_name": f"{split}.jsonl",
            "formatting": "sharegpt",
            "ranking": True,
            "columns": columns,
        }
        for split in splits
    }
