"""Find published weights, and say what they are."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Literal

from mint_ray.config.loader import UserError
from mint_ray.models.bundled import PREFIX, bundle_of, bundled_folder

READ = (".json", ".safetensors", ".model", ".jinja", ".txt")
"""Ends of the names of the files that make a model in a folder what it is."""

Use = Literal["vision", "text"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where published weights are had from, and what the user calls them."""

    model_id: str
    path: str
    """A folder, or an id of the Hub."""
    revision: str | None = None


def identity_of(model_id: str, revision: str | None, use: Use | None = None) -> str:
    """The sha256 of a bundled model's wheel or of a folder's files, or the commit of a model of the Hub; no network.

    Raises UserError for a folder without safetensors and for a model of the Hub without a commit.
    """
    if use is not None and model_id.startswith(PREFIX):
        return bundle_of(model_id, use).wheel_sha256
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"revision: {model_id} is a folder and has none")
        files = sorted(path for path in folder.iterdir() if path.suffix in READ)
        if not any(path.suffix == ".safetensors" for path in files):
            raise UserError(f"model_id: {model_id}: holds no .safetensors, and nothing else is read")
        lines = [f"{path.name} {_sha256(path)}\n" for path in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    if revision is None:
        raise UserError(f"model_id: no folder {model_id!r}; a model of the Hub needs its commit as revision")
    return revision


def place_of(model_id: str, use: Use) -> str:
    """What `from_pretrained` is to be given: a folder or an id of the Hub. Fetches a bundled model."""
    if model_id.startswith(PREFIX):
        return str(bundled_folder(bundle_of(model_id, use)))
    folder = Path(model_id).expanduser()
    return str(folder) if folder.is_dir() else model_id


def sees_images(place: Place) -> bool:
    """Whether a model, which is known to be had, takes images beside text: its `config.json` says so."""
    path = Path(place.path) / "config.json"
    if not path.is_file():
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(place.path, "config.json", revision=place.revision))
    return json.loads(path.read_text(encoding="utf-8")).get("vision_config") is not None


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
