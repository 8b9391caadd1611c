"""Say what a teacher's published weights are."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mint_ray import storage
from mint_ray.loading import UserError

READ = (".json", ".safetensors", ".model", ".jinja", ".txt")
"""Ends of the names of the files that make a model in a folder what it is."""


def identity_of(model_id: str, revision: str | None) -> str:
    """A sha256 over the files of a folder, or the commit of a model of the Hub; no network.

    Raises UserError for a folder without safetensors and for a model of the Hub without a commit.
    """
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
