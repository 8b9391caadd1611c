"""Job package: the resolved spec and the code that it names, without secrets and without data."""

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
from mint_ray.config.loader import UserError, dump, fingerprint, without_resources
from mint_ray.config.pipeline import PipelineConfig

SPEC = "resolved-spec.yaml"
PACKAGED_SUFFIXES = (".py", ".yaml", ".yml", ".toml", ".txt", ".md", ".j2", ".json")
"""Code and text. Other files are data: they are refused, since every node keeps a copy of the package."""
MAX_FILE_BYTES, MAX_PACKAGE_BYTES = 256 << 10, 2 << 20
SHARED_DISK_HINT = "or pass --shared-disk if every node of the cluster mounts it"

SECRET_NAME = re.compile(
    r"(^|[._-])(env|credentials?|secrets?|tokens?|passwords?|netrc|kubeconfig|id_(rsa|dsa|ecdsa|ed25519))($|[._-])"
    r"|\.(pem|key|p12|pfx|keytab|jks)$",
    re.IGNORECASE,
)
SECRET_TEXT = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY-----|\b(AKIA|ASIA)[0-9A-Z]{16}\b|\b(hf|ghp)_[A-Za-z0-9]{30,}|://[^/\s:@\"']+:[^/\s@\"']+@"
)
"""Private keys, AWS access keys, tokens of the Hugging Face Hub and of GitHub, passwords in URIs."""


@dataclass(frozen=True, slots=True)
class JobPackage:
    """Files, requirements and command of a job."""

    verb: str
    root: str
    """Root under which the job writes its artifacts."""
    fingerprint: str
    """Twelve hex digits of verb, versions, files and spec without its `resources`; equal fingerprints are one job."""
    resources: str
    """Twelve hex digits of the above with `resources`; jobs that differ only here request other workers."""
    files: dict[str, bytes]
    """File contents by path within the job's working directory."""
    requirements: list[str] = field(default_factory=list)
    """pip requirements that are installed on top of the cluster's image."""

    @property
    def entrypoint(self) -> str:
        """Shell command that the cluster runs in the working directory."""
        return f"python -m mint_ray.cli {self.verb} {SPEC} --json"


def build_package(
    config: PipelineConfig,
    verb: str,
    *,
    shared_disk: bool,
    requirements: Path | None = None,
    working_dir: Path | None = None,
) -> JobPackage:
    """Build the package of a job that runs `verb` on `config`.

    With `shared_disk` every node mounts this machine's disks: paths become absolute and only imported code is packaged.

    Args:
        config: Config of a run, a comparison or a sweep.
        verb: Command of `mint-ray` that the job runs.
        shared_disk: Treat local paths as visible from every node.
        requirements: File with pip requirements that are missing from the cluster's image.
        working_dir: Folder that the config's relative paths start from (default: the current one).

    Raises:
        UserError: A path is not visible from the cluster, or a file must not leave this machine.
    """
    working_dir = (working_dir or Path.cwd()).resolve()
    root = _resolve_root(config.root, shared_disk)
    data = dump(config)
    data["root"] = root
    files = _resolve_paths(data, working_dir, shared_disk)
    for module in _imported_modules(data):
        files |= _read_module(working_dir, module)
    files[SPEC] = _to_yaml(data)
    _check_secret(SPEC, files[SPEC])
    total = sum(map(len, files.values()))
    if total > MAX_PACKAGE_BYTES:
        raise UserError(f"the job package has {total:,} bytes; the limit is {MAX_PACKAGE_BYTES:,}: {', '.join(files)}")
    packages = _read_requirements(requirements)
    code = {name: content.decode(errors="replace") for name, content in files.items() if name != SPEC}
    parts = [verb, importlib.metadata.version("mint-ray"), packages, code]
    return JobPackage(
        verb=verb,
        root=root,
        fingerprint=fingerprint(*parts, without_resources(config, data)),
        resources=fingerprint(*parts, files[SPEC].decode()),
        files=files,
        requirements=packages,
    )


def _resolve_root(root: str, shared_disk: bool) -> str:
    is_local = "://" not in root or root.startswith("file://")
    if is_local and not shared_disk:
        raise UserError(
            f"root: {root}: is on this machine's disk; pass --root s3://... or gs://..., {SHARED_DISK_HINT}"
        )
    return storage.absolute(root)


def _resolve_paths(data: dict[str, Any], working_dir: Path, shared_disk: bool) -> dict[str, bytes]:
    """Return the files that `data` names by relative paths; with `shared_disk`, make those paths absolute instead."""
    files: dict[str, bytes] = {}
    for section, key, value in _strings(data):
        if not _may_be_path(key, value):
            continue
        path = Path(value).expanduser()
        exists = (working_dir / path).exists()
        if shared_disk:
            if exists:
                section[key] = str((working_dir / path).absolute())
        elif path.is_absolute():
            if exists:
                raise UserError(
                    f"{key}: {value}: is on this machine's disk; upload it to object storage, {SHARED_DISK_HINT}"
                )
        elif exists:
            files |= _read_files(working_dir, path)
        elif key == "uri":
            raise UserError(f"{key}: {value}: no such file or folder; give paths on the cluster as absolute paths")
    return files


def _strings(part: Any) -> Iterator[tuple[Any, Any, str]]:
    """Yield container, key and value of every string in the spec except `root` and `title`."""
    pairs = part.items() if isinstance(part, dict) else enumerate(part)
    for key, value in list(pairs):
        if isinstance(value, dict | list):
            yield from _strings(value)
        elif isinstance(value, str) and key not in ("root", "title"):
            yield part, key, value


def _may_be_path(key: Any, value: str) -> bool:
    """Return False for labels, names and prompts that happen to be spelled like an existing folder."""
    if "://" in value or "\n" in value or len(value) > 1024:
        return False
    return key in ("uri", "model_id") or str(key).endswith("_uri") or "/" in value


def _read_files(working_dir: Path, path: Path) -> dict[str, bytes]:
    """Read the file `path`, or every file below the folder `path`, by path relative to `working_dir`."""
    top = Path(os.path.normpath(working_dir / path))
    inside = sorted(item for item in top.rglob("*") if item.is_file()) if top.is_dir() else [top]
    for item in [top, *inside]:
        # a symbolic link may point outside
        if not (item.is_relative_to(working_dir) and item.resolve().is_relative_to(working_dir)):
            raise UserError(f"{item}: is outside {working_dir}; upload it to object storage, {SHARED_DISK_HINT}")
    return {str(item.relative_to(working_dir)): _read_file(item) for item in inside if "__pycache__" not in item.parts}


def _read_file(path: Path) -> bytes:
    if SECRET_NAME.search(path.name):
        raise UserError(f"{path}: looks like a secret; it is not packaged")
    if path.suffix not in PACKAGED_SUFFIXES:
        raise UserError(f"{path}: is data; upload it to object storage and give its s3:// or gs:// address")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes; the limit per packaged file is {MAX_FILE_BYTES:,}")
    content = path.read_bytes()
    _check_secret(str(path), content)
    return content


def _check_secret(where: str, content: bytes) -> None:
    found = SECRET_TEXT.search(content)
    if found:
        line = content[: found.start()].count(b"\n") + 1
        raise UserError(f"{where}: line {line}: looks like a secret; put secrets into the cluster's environment")


def _imported_modules(part: Any) -> Iterator[str]:
    """Yield the top-level module of every member of kind `import`."""
    if isinstance(part, dict):
        if part.get("kind") == "import" and isinstance(part.get("path"), str):
            yield part["path"].partition(":")[0].partition(".")[0]
        for value in part.values():
            yield from _imported_modules(value)
    elif isinstance(part, list):
        for value in part:
            yield from _imported_modules(value)


def _read_module(working_dir: Path, name: str) -> dict[str, bytes]:
    """Read the code of a module in `working_dir`; an installed module is expected in the cluster's image."""
    if (working_dir / f"{name}.py").is_file():
        return _read_files(working_dir, Path(f"{name}.py"))
    if not (working_dir / name).is_dir():
        return {}
    paths = [path.relative_to(working_dir) for path in sorted((working_dir / name).rglob("*.py"))]
    return {name: content for path in paths for name, content in _read_files(working_dir, path).items()}


def _read_requirements(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = [line.partition(" #")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    _check_secret(str(path), path.read_bytes())
    return [line for line in lines if line and not line.startswith("#")]


def _to_yaml(data: dict[str, Any]) -> bytes:
    text = StringIO()
    YAML(typ="safe", pure=True).dump(data, text)
    return text.getvalue().encode()
