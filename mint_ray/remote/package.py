"""What travels to a cluster with a job: the resolved spec and the code it names, and nothing that is secret or data."""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from mint_ray import storage
from mint_ray.config.loader import UserError, dump, fingerprint
from mint_ray.config.pipeline import PipelineConfig

SPEC = "resolved-spec.yaml"
TRAVELS = (".py", ".yaml", ".yml", ".toml", ".txt", ".md", ".j2", ".json")
"""Code and text; anything else is data, and every node keeps a copy of what travels."""
FILE_BYTES, PARCEL_BYTES = 256 << 10, 2 << 20

SECRET_NAME = re.compile(
    r"(^|[._-])(env|credentials?|secrets?|tokens?|passwords?|netrc|kubeconfig|id_(rsa|dsa|ecdsa|ed25519))($|[._-])"
    r"|\.(pem|key|p12|pfx|keytab|jks)$",
    re.IGNORECASE,
)
SECRET_TEXT = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY-----|\b(AKIA|ASIA)[0-9A-Z]{16}\b|\b(hf|ghp)_[A-Za-z0-9]{30,}|://[^/\s:@\"']+:[^/\s@\"']+@"
)
"""Private keys, access keys of AWS, tokens of the Hugging Face Hub and GitHub, passwords in URIs."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """Everything that a job is made of."""

    verb: str
    root: str
    """Where its artifacts will lie."""
    recipe: str
    """Twelve digits of verb, versions, files and spec without its `resources`: two of a kind are one job."""
    resources: str
    """Twelve digits of the whole spec: of two jobs of a kind, whether they ask for the same machines."""
    files: dict[str, bytes]
    """By path within the working directory."""
    requirements: list[str] = field(default_factory=list)
    """What is installed on top of the image."""

    @property
    def entrypoint(self) -> str:
        """The command that the cluster runs in the working directory."""
        return f"python -m mint_ray.cli {self.verb} {SPEC} --json"


def pack(
    config: PipelineConfig, verb: str, *, shared_disk: bool, requirements: Path | None = None, here: Path | None = None
) -> Parcel:
    """Make the parcel of a run of `config`; its relative paths are seen from the folder `here`, by default this one.

    With `shared_disk`, every machine sees the disks of this one: its paths are made absolute, and no file but code
    travels. Raises UserError naming the path that a machine elsewhere does not see, or the file that must not travel.
    """
    here = (here or Path.cwd()).resolve()
    root = _check_root(config.root, shared_disk)
    data = dump(config)
    data["root"] = root
    files: dict[str, bytes] = {}
    for section, key, value in _strings(data):
        if not _may_be_path(key, value):
            continue
        path = Path(value).expanduser()
        if shared_disk:
            if (here / path).exists():
                section[key] = str((here / path).absolute())
        elif path.is_absolute():
            if path.exists():
                raise UserError(
                    f"{key}: {value}: lies on this machine's disk; put it into object storage, or say --shared-disk "
                    f"if every machine of the cluster sees it"
                )
        elif (here / path).exists():
            files |= _read(here, path)
        elif key == "uri":
            raise UserError(f"{key}: {value}: no such file or folder; what lies on the cluster is named from /")
    for module in _imported_modules(data):
        files |= _read_module(here, module)
    files[SPEC] = _yaml(data)
    _check_secret(SPEC, files[SPEC])
    total = sum(map(len, files.values()))
    if total > PARCEL_BYTES:
        raise UserError(f"{total:,} bytes would travel with the job, more than {PARCEL_BYTES:,}: {', '.join(files)}")
    wanted = _read_requirements(requirements)
    code = {name: content.decode(errors="replace") for name, content in files.items() if name != SPEC}
    parts = [verb, importlib.metadata.version("mint-ray"), wanted, code]
    return Parcel(
        verb=verb,
        root=root,
        recipe=fingerprint(*parts, data),
        resources=fingerprint(*parts, files[SPEC].decode()),
        files=files,
        requirements=wanted,
    )


def _check_root(root: str, shared_disk: bool) -> str:
    local = "://" not in root or root.startswith("file://")
    if local and not shared_disk:
        raise UserError(
            f"root: {root}: lies on this machine's disk; give --root s3://... or gs://..., or say --shared-disk if "
            f"every machine of the cluster sees it"
        )
    return storage.absolute(root)


def _strings(part: Any) -> Iterator[tuple[Any, Any, str]]:
    """Every string of the spec but its `root` and `title`, with the mapping or list that holds it and its key."""
    pairs = part.items() if isinstance(part, dict) else enumerate(part)
    for key, value in list(pairs):
        if isinstance(value, dict | list):
            yield from _strings(value)
        elif isinstance(value, str) and key not in ("root", "title"):
            yield part, key, value


def _may_be_path(key: Any, value: str) -> bool:
    """Whether a file could be meant: labels, names and prompts may be spelt like a folder that happens to be there."""
    if "://" in value or "\n" in value or len(value) > 1024:
        return False
    return key in ("uri", "model_id") or str(key).endswith("_uri") or "/" in value


def _read(here: Path, path: Path) -> dict[str, bytes]:
    """The files at and below `path`, by their path from `here`."""
    top = Path(os.path.normpath(here / path))
    inside = sorted(item for item in top.rglob("*") if item.is_file()) if top.is_dir() else [top]
    for item in [top, *inside]:
        # a link may lead elsewhere
        if not (item.is_relative_to(here) and item.resolve().is_relative_to(here)):
            raise UserError(
                f"{item}: lies outside {here}; put it into object storage, or say --shared-disk if every machine of "
                f"the cluster sees it"
            )
    return {str(item.relative_to(here)): _read_file(item) for item in inside if "__pycache__" not in item.parts}


def _read_file(path: Path) -> bytes:
    if SECRET_NAME.search(path.name):
        raise UserError(f"{path}: looks like a secret; it stays here")
    if path.suffix not in TRAVELS:
        raise UserError(f"{path}: is data; put it into object storage and name it by its s3:// or gs:// address")
    if path.stat().st_size > FILE_BYTES:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes, more than the {FILE_BYTES:,} that travel with a job")
    content = path.read_bytes()
    _check_secret(str(path), content)
    return content


def _check_secret(where: str, content: bytes) -> None:
    found = SECRET_TEXT.search(content)
    if found:
        line = content[: found.start()].count(b"\n") + 1
        raise UserError(f"{where}: line {line}: looks like a secret; secrets belong in the cluster's environment")


def _imported_modules(part: Any) -> Iterator[str]:
    """First names of the modules that the spec imports."""
    if isinstance(part, dict):
        if part.get("kind") == "import" and isinstance(part.get("path"), str):
            yield part["path"].partition(":")[0].partition(".")[0]
        for value in part.values():
            yield from _imported_modules(value)
    elif isinstance(part, list):
        for value in part:
            yield from _imported_modules(value)


def _read_module(here: Path, name: str) -> dict[str, bytes]:
    """The code of a module that lies here; nothing for one that is installed, which the image must have too."""
    if (here / f"{name}.py").is_file():
        return _read(here, Path(f"{name}.py"))
    if not (here / name).is_dir():
        return {}
    code = sorted((here / name).rglob("*.py"))
    return {name: content for item in code for name, content in _read(here, item.relative_to(here)).items()}


def _read_requirements(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = [line.partition(" #")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    _check_secret(str(path), path.read_bytes())
    return [line for line in lines if line and not line.startswith("#")]


def _yaml(data: dict[str, Any]) -> bytes:
    text = StringIO()
    YAML(typ="safe", pure=True).dump(data, text)
    return text.getvalue().encode()
