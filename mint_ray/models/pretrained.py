"""Pretrained models by their id: bundled, on the Hub, in a folder or in object storage. Importing this loads no torch.

`resolve_model` gives what `from_pretrained` is called with, `model_identity` what artifacts are named by, `check_model`
an error if the model cannot be loaded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from mint_ray import storage
from mint_ray.config.loader import UserError
from mint_ray.models import hub
from mint_ray.models.bundled import PREFIX, Use, cache_root, download_bundle, find_bundle

MODEL_FILES = (".json", ".safetensors", ".model", ".jinja", ".txt")
"""Suffixes of the files that a model is loaded from."""
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


class ModelReference(Protocol):
    """Settings that name a pretrained model."""

    @property
    def model_id(self) -> str:
        """`bundled:<name>`, a folder, a URI in object storage, or an id on the Hub."""
        ...

    @property
    def revision(self) -> str | None:
        """Branch, tag or commit on the Hub."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainedModel:
    """A model that can be passed to `from_pretrained`."""

    model_id: str
    """The id in the user's config, for error messages."""
    path: str
    """A local folder or an id on the Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; ignored for a folder."""


def resolve_model(reference: ModelReference, use: Use) -> PretrainedModel:
    """Return the model to pass to `from_pretrained`; download it first if it is bundled or in object storage.

    Raises:
        UserError: The bundled or stored model cannot be downloaded.
    """
    model_id = reference.model_id
    if model_id.startswith(PREFIX):
        path = str(download_bundle(find_bundle(model_id, use)))
    elif (folder := _local_folder(model_id)) is not None:
        path = str(folder)
    else:
        # the cached copy is read as a folder: no request per file, and exactly the commit of `model_identity`
        snapshot = hub.cached_snapshot(model_id, reference.revision) if use == "student" else None
        path = str(snapshot) if snapshot and not _find_problem(snapshot) else model_id
    return PretrainedModel(model_id=model_id, path=path, revision=reference.revision)


def model_identity(reference: ModelReference, use: Use) -> str:
    """Return a string that changes if the model's files do, for fingerprints; the Hub is not contacted.

    The identity is the sha256 of a bundled model's wheel; for object storage a sha256 of names and sizes; for a folder
    a sha256 of its files' contents, or of their names, sizes and times for a student, whose weights can be large; for
    the Hub the commit. For a student without a pinned commit it is the commit in the local cache (`check_model` stores
    it there), else the name of the revision.

    Raises:
        UserError: The model does not exist, or has no safetensors, or is on the Hub without a commit.
    """
    model_id, revision = reference.model_id, reference.revision
    if model_id.startswith(PREFIX):
        return find_bundle(model_id, use).wheel_sha256
    if "://" in model_id:
        return _stored_identity(model_id)
    folder = _local_folder(model_id)
    if folder is not None and not folder.is_dir():
        raise UserError(f"model_id: no folder {model_id!r}")
    if use != "student":
        return _pinned_identity(folder, model_id, revision)
    if folder is not None:
        return _hash_times(folder)
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    snapshot = hub.cached_snapshot(model_id, revision)
    return snapshot.name if snapshot else revision or "main"


def check_model(reference: ModelReference) -> None:
    """Check that a student can be loaded: its weights, tokenizer and image processor exist. Loads no weights.

    A bundled or stored model is downloaded if it is not cached.

    Raises:
        UserError: A file is missing, or the Hub does not have the model.
    """
    model_id = reference.model_id
    if model_id.startswith(PREFIX):
        download_bundle(find_bundle(model_id))
        return
    folder = _local_folder(model_id)
    if folder is not None:
        if not folder.is_dir():
            raise UserError(f"model_id: no folder {model_id!r}")
        problem = _find_problem(folder)
        if problem:
            raise UserError(f"model_id: {model_id}: {problem}")
        return
    snapshot = hub.cached_snapshot(model_id, reference.revision)
    problem = _find_problem(snapshot) if snapshot else "not in the local cache"
    if problem is None:
        return
    files = hub.list_files(model_id, reference.revision, problem)
    if not files.intersection(WEIGHT_FILES):
        raise UserError(f"model_id: {model_id}: no model.safetensors on the Hub; other formats are not read")
    if not files.intersection(TOKENIZER_FILES):
        raise UserError(f"model_id: {model_id}: no tokenizer on the Hub (expected one of {', '.join(TOKENIZER_FILES)})")


def takes_images(model: PretrainedModel) -> bool:
    """Return True if the model takes images as well as text, which its `config.json` says."""
    return read_config(model).get("vision_config") is not None


def read_config(model: PretrainedModel) -> dict[str, Any]:
    """Return the content of the model's `config.json`, which is downloaded if it is not in the local cache."""
    path = Path(model.path) / "config.json"
    if not path.is_file():
        path = hub.download_config(model.path, model.revision)
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def _local_folder(model_id: str) -> Path | None:
    """Return the folder that `model_id` names, whether it exists or not; None if it can only be a Hub id."""
    if "://" in model_id:
        return _download_stored(model_id)
    path = Path(model_id).expanduser()
    is_path = model_id.startswith((".", "/", "~")) or model_id.count("/") > 1
    return path if is_path or path.is_dir() else None


def _find_problem(folder: Path) -> str | None:
    """Return the reason why `folder` cannot be loaded as a student, or None."""
    if not (folder / "config.json").is_file():
        return "no config.json"
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        if missing:
            return f"{missing[0]} is missing ({len(missing)} of {len(shards)} weight files)"
    elif not (folder / "model.safetensors").is_file():
        pickled = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(pattern))]
        return f"no model.safetensors{f' (only safetensors are read, found {pickled[0]})' if pickled else ''}"
    if not _has_any(folder, TOKENIZER_FILES):
        return f"no tokenizer (expected one of {', '.join(TOKENIZER_FILES)})"
    is_vlm = "vision_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if is_vlm and not _has_any(folder, PROCESSOR_FILES):
        return f"no image processor (expected one of {', '.join(PROCESSOR_FILES)})"
    return None


def _has_any(folder: Path, names: Iterable[str]) -> bool:
    return any((folder / name).is_file() for name in names)


def _pinned_identity(folder: Path | None, model_id: str, revision: str | None) -> str:
    """Return a sha256 of the contents of a folder's files, or the commit of a model on the Hub."""
    if folder is None:
        if revision is None:
            raise UserError(f"model_id: no folder {model_id!r}; a model on the Hub needs its commit as revision")
        return revision
    if revision is not None:
        raise UserError(f"revision: {model_id} is a folder, which has no revisions")
    files = sorted(path for path in folder.iterdir() if path.suffix in MODEL_FILES)
    if not any(path.suffix == ".safetensors" for path in files):
        raise UserError(f"model_id: {model_id}: no .safetensors; other formats are not read")
    return _hash_lines(f"{path.name} {_hash_file(path)}\n" for path in files)


def _hash_times(folder: Path) -> str:
    """Return a sha256 of the names, sizes and modification times of all files in `folder`."""
    stats = {path: path.stat() for path in sorted(folder.rglob("*")) if path.is_file()}
    return _hash_lines(
        f"{path.relative_to(folder).as_posix()}\0{stat.st_size}\0{stat.st_mtime_ns}\n" for path, stat in stats.items()
    )


def _stored_identity(uri: str) -> str:
    """Return a sha256 of the names and sizes of the files at `uri`; a change that keeps the size goes unnoticed."""
    sizes = storage.file_sizes(uri)
    if not sizes:
        raise UserError(f"model_id: no folder {uri!r}")
    return _hash_lines(f"{name.removeprefix(uri)}\t{size}\n" for name, size in sizes.items())


def _download_stored(uri: str) -> Path:
    """Return a copy of the folder at `uri` in the cache, downloaded the first time."""
    name = hashlib.sha256(f"{uri}\n{_stored_identity(uri)}".encode()).hexdigest()[:12]
    folder = cache_root() / "stored" / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # downloaded to a temporary folder and renamed: a crash leaves no partial model, the first of two workers wins
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as scratch:
        storage.download_folder(uri, f"{scratch}/model")
        try:
            (Path(scratch) / "model").rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    return folder


def _hash_lines(lines: Iterable[str]) -> str:
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
