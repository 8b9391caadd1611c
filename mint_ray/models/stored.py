"""Bring a student that lies in object storage to this machine, once."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from mint_ray import storage
from mint_ray.config.loader import UserError
from mint_ray.models.bundled import cache_root


def stored_revision(uri: str) -> str:
    """A sha256 over the names and sizes of the files at `uri`: what is replaced by as many bytes is not noticed.

    Raises UserError when nothing is there.
    """
    lines = [f"{name.removeprefix(uri)}\t{size}\n" for name, size in storage.file_sizes(uri).items()]
    if not lines:
        raise UserError(f"model_id: no folder {uri!r}")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def stored_folder(uri: str) -> Path:
    """A copy of the folder at `uri` below `cache_root()`, made the first time. Raises UserError if it is not there."""
    name = hashlib.sha256(f"{uri}\n{stored_revision(uri)}".encode()).hexdigest()[:12]
    folder = cache_root() / "stored" / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # brought beside its place and renamed into it: a crash leaves no half model, and of two workers the first one wins
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as scratch:
        storage.download_folder(uri, f"{scratch}/whole")
        try:
            (Path(scratch) / "whole").rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    return folder
