"""Read and write files by URI: the only module that distinguishes S3 from a disk."""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from pyarrow import fs

from mint_ray.config.loader import UserError, one_line

CHUNK_BYTES = 1 << 20
ATTEMPTS = 10
"""Number of times a request is sent to S3 before 503 or a broken connection is an error; the pauses add up to 30 s.

pyarrow gives up after 3 attempts, about a second. With its standard strategy a client has a fixed quota of retries, and
fails at the first error once it has used them up.
"""
CHECK_ATTEMPTS = 3
"""Number of attempts of a run's first request: a wrong endpoint is reported within seconds."""


def resolve(uri: str, attempts: int = ATTEMPTS) -> tuple[fs.FileSystem, str]:
    """Return the pyarrow file system of `uri` and the path within it; S3 requests are sent up to `attempts` times.

    `s3://` takes endpoint and credentials from AWS_ENDPOINT_URL and the usual AWS chain, `gs://` from Google's. A URI
    without a scheme is a local path. Raises UserError for any other scheme.
    """
    scheme, _, location = uri.partition("://")
    if not location:
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    if scheme == "s3":
        return _arrow_s3(attempts, _s3_environment()), location.rstrip("/")
    if scheme in ("file", "gs", "gcs"):
        filesystem, path = fs.FileSystem.from_uri(uri)
        return filesystem, path
    raise UserError(f"{uri}: unknown scheme {scheme!r}; expected s3, gs, file or a local path")


def absolute(uri: str) -> str:
    """Return `uri` without a trailing slash; a local path becomes absolute."""
    return uri.rstrip("/") if "://" in uri else os.path.abspath(os.path.expanduser(uri))


def join(uri: str, *parts: str) -> str:
    """Return `uri` with path parts appended."""
    return "/".join([uri.rstrip("/"), *parts])


def exists(uri: str) -> bool:
    """Return whether there is a file or folder."""
    filesystem, path = resolve(uri)
    return bool(filesystem.get_file_info(path).type != fs.FileType.NotFound)


def list_files(uri: str) -> list[str]:
    """Return the sorted URIs of all files below a folder, or of the file itself. Raises UserError without any."""
    return list(file_sizes(uri))


def list_names(uri: str) -> list[str]:
    """Return the names of the files and folders directly below a folder; none if it does not exist."""
    filesystem, path = resolve(uri)
    selector = fs.FileSelector(path, allow_not_found=True)
    return sorted(info.base_name for info in filesystem.get_file_info(selector))


def file_sizes(uri: str) -> dict[str, int]:
    """Return the bytes of each file that `list_files` returns, in its order."""
    filesystem, path = resolve(uri)
    info = filesystem.get_file_info(path)
    if info.type == fs.FileType.NotFound:
        raise UserError(f"{uri}: no such file or folder")
    if info.type == fs.FileType.File:
        return {uri: int(info.size)}
    found = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    below = sorted((item.path[len(path) :].lstrip("/"), item.size) for item in found if item.type == fs.FileType.File)
    return {join(uri, name): int(size) for name, size in below}


@contextmanager
def open_input(uri: str) -> Iterator[BinaryIO]:
    """Open one file as a seekable binary stream. Raises UserError if it is missing."""
    filesystem, path = resolve(uri)
    try:
        stream = filesystem.open_input_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{uri}: no such file") from error
    with stream:
        yield stream


def read_bytes(uri: str) -> bytes:
    """Return the content of one small file. Raises UserError if it is missing."""
    with open_input(uri) as stream:
        return stream.read()


def size(uri: str) -> int | None:
    """Return the bytes of one file; None if it does not exist."""
    filesystem, path = resolve(uri)
    info = filesystem.get_file_info(path)
    return int(info.size) if info.type == fs.FileType.File else None


def write_bytes(uri: str, content: bytes) -> None:
    """Write one file atomically: readers see all of it or nothing."""
    filesystem, path = resolve(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        _put_on_disk(path, content, os.replace)
        return
    # the content is complete before the upload starts: a stream would be published even if its writer raised
    with filesystem.open_output_stream(path) as stream:
        stream.write(content)


def create_bytes(uri: str, content: bytes, *, once: bool) -> bool:
    """Write one file atomically unless it exists; return whether its content is now `content`.

    With `once`, exactly one of several writers succeeds: on S3 by a conditional PUT (If-None-Match: *), on a disk by a
    hard link. For a store that supports neither (`creates_once`), `once` is False: the file is looked up and then
    written, so that two writers at the same moment may replace each other's file.
    """
    filesystem, path = resolve(uri)
    if not once:
        if not exists(uri):
            write_bytes(uri, content)
            return True
        return read_bytes(uri) == content
    try:
        if isinstance(filesystem, fs.LocalFileSystem):
            _put_on_disk(path, content, os.link)
        else:
            _s3fs(_s3_environment()).pipe_file(path, content, mode="create")
    except OSError:
        # a request whose response was lost is sent again, and then finds its own file
        if not exists(uri):
            raise
        return read_bytes(uri) == content
    return True


def creates_once(root: str) -> bool:
    """Return whether the store of `root` lets exactly one of several writers succeed; tried once per process."""
    return _creates_once(absolute(root), _s3_environment())


def upload(local_path: str, uri: str) -> None:
    """Copy one local file to `uri`."""
    filesystem, path = resolve(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        os.makedirs(os.path.dirname(path), exist_ok=True)
    fs.copy_files(local_path, path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=filesystem)


def download_folder(uri: str, local_path: str) -> None:
    """Copy every file below `uri` into a local folder."""
    filesystem, path = resolve(uri)
    os.makedirs(local_path, exist_ok=True)
    fs.copy_files(path, local_path, source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem())


def delete_file(uri: str) -> None:
    """Delete one file, if it exists."""
    filesystem, path = resolve(uri)
    if filesystem.get_file_info(path).type == fs.FileType.File:
        with suppress(FileNotFoundError):
            filesystem.delete_file(path)


def delete_folder(uri: str) -> None:
    """Delete a folder and everything below it, if it exists."""
    filesystem, path = resolve(uri)
    if filesystem.get_file_info(path).type == fs.FileType.Directory:
        filesystem.delete_dir(path)


def sha256(uri: str) -> str:
    """Return the hex digest of one file's content."""
    digest = hashlib.sha256()
    with open_input(uri) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def check_writable(uri: str) -> None:
    """Raise UserError if nothing can be written below `uri`."""
    filesystem, path = resolve(join(uri, f".writable-{uuid.uuid4().hex}"), CHECK_ATTEMPTS)
    try:
        if isinstance(filesystem, fs.LocalFileSystem):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        else:
            _check_bucket(filesystem, path.partition("/")[0])
        with filesystem.open_output_stream(path):
            pass
        filesystem.delete_file(path)
    except OSError as error:
        raise UserError(f"{uri}: cannot be written: {one_line(error)}") from error


def _check_bucket(filesystem: fs.FileSystem, bucket: str) -> None:
    """Raise FileNotFoundError if there is no such bucket: SeaweedFS creates it for any writer."""
    try:
        info = filesystem.get_file_info(bucket)
    except OSError:
        return  # write access below a prefix does not imply access to the bucket
    if info.type == fs.FileType.NotFound:
        raise FileNotFoundError(f"bucket {bucket!r} does not exist")


def _put_on_disk(path: str, content: bytes, move: Callable[[str, str], None]) -> None:
    """Write a temporary file beside `path`, then `move` it in one step. Raises FileExistsError if `move` does."""
    for _ in range(3):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        partial = f"{path}.{uuid.uuid4().hex}.partial"
        try:
            with open(partial, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            move(partial, path)
            return
        except FileNotFoundError:
            # a run of the same spec has published in the meantime, and removed it
            continue
        finally:
            with suppress(FileNotFoundError):
                os.unlink(partial)
    raise FileNotFoundError(errno.ENOENT, "removed each time it was written", path)


@functools.cache
def _creates_once(root: str, environment: tuple[tuple[str, str], ...]) -> bool:
    filesystem, path = resolve(join(root, f".once-{uuid.uuid4().hex}"))
    if not isinstance(filesystem, fs.LocalFileSystem | fs.S3FileSystem):
        return False
    try:
        if isinstance(filesystem, fs.LocalFileSystem):
            return _supports_hard_links(path)
        return _supports_if_none_match(path, _s3fs(environment))
    finally:
        with suppress(OSError):
            filesystem.delete_file(path)


def _supports_hard_links(path: str) -> bool:
    """Return whether the disk has hard links; some network and FUSE file systems have none."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        _put_on_disk(path, b"", os.link)
    except OSError:
        return False
    return True


def _supports_if_none_match(path: str, s3: Any) -> bool:
    """Return whether only a second conditional PUT fails; other stores fail at the first or at neither."""
    try:
        s3.pipe_file(path, b"", mode="create")
    except OSError:
        return False
    try:
        s3.pipe_file(path, b"", mode="create")
    except OSError:
        return True
    return False


def _s3_environment() -> tuple[tuple[str, str], ...]:
    """Return the settings of S3 connections; connections are kept as long as these are unchanged."""
    return tuple(sorted((key, value) for key, value in os.environ.items() if key.startswith("AWS_")))


def _endpoint(environment: tuple[tuple[str, str], ...]) -> str | None:
    variables = dict(environment)
    return variables.get("AWS_ENDPOINT_URL_S3") or variables.get("AWS_ENDPOINT_URL")


@functools.cache
def _arrow_s3(attempts: int, environment: tuple[tuple[str, str], ...]) -> fs.FileSystem:
    # allow_delayed_open: a small file is one request instead of the three of a multipart upload
    options: dict[str, Any] = {
        "retry_strategy": fs.AwsDefaultS3RetryStrategy(max_attempts=attempts),
        "allow_delayed_open": True,
    }
    endpoint, variables = _endpoint(environment), dict(environment)
    if endpoint is not None:
        parts = urlsplit(endpoint)
        options |= {
            "endpoint_override": parts.netloc,
            "scheme": parts.scheme,
            "region": variables.get("AWS_REGION") or variables.get("AWS_DEFAULT_REGION") or "us-east-1",
            "force_virtual_addressing": False,
        }
    return fs.S3FileSystem(**options)


@functools.cache
def _s3fs(environment: tuple[tuple[str, str], ...]) -> Any:
    """Return a client for conditional requests, which pyarrow does not support."""
    import s3fs

    client = s3fs.S3FileSystem(
        endpoint_url=_endpoint(environment),
        config_kwargs={"retries": {"mode": "legacy", "max_attempts": 5}},  # the other modes have a quota
        skip_instance_cache=True,
    )
    # s3fs's own retries, around botocore's, cover only 503 and broken connections
    client.retries = 2
    return client
