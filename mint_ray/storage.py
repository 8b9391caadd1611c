"""Read and write bytes by URI; the only module that knows S3 from disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO
from urllib.parse import urlsplit

from pyarrow import fs

from mint_ray.loading import UserError

CHUNK_BYTES = 1 << 20


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """The pyarrow file system of `uri` and the path within it.

    `s3://` takes endpoint and credentials from AWS_ENDPOINT_URL and the usual AWS chain, `gs://` from Google's;
    anything without a scheme is a local path. Raises UserError for another scheme.
    """
    scheme, _, rest = uri.partition("://")
    if not rest:
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    if scheme == "s3":
        return _s3(), rest.rstrip("/")
    if scheme in ("file", "gs", "gcs"):
        filesystem, path = fs.FileSystem.from_uri(uri)
        return filesystem, path
    raise UserError(f"{uri}: unknown scheme {scheme!r}; expected s3, gs, file or a local path")


def absolute(uri: str) -> str:
    """`uri` as a worker on another machine would have to spell it; local paths become absolute."""
    return uri.rstrip("/") if "://" in uri else os.path.abspath(os.path.expanduser(uri))


def join(uri: str, *parts: str) -> str:
    """`uri` with path parts added below it."""
    return "/".join([uri.rstrip("/"), *parts])


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    filesystem, path = resolve(uri)
    return bool(filesystem.get_file_info(path).type != fs.FileType.NotFound)


def list_files(uri: str) -> list[str]:
    """Sorted URIs of all files below a folder, or of the file itself. Raises UserError when nothing is there."""
    filesystem, path = resolve(uri)
    info = filesystem.get_file_info(path)
    if info.type == fs.FileType.NotFound:
        raise UserError(f"{uri}: no such file or folder")
    if info.type == fs.FileType.File:
        return [uri]
    found = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    below = sorted(item.path[len(path) :].lstrip("/") for item in found if item.type == fs.FileType.File)
    return [join(uri, name) for name in below]


@contextmanager
def open_input(uri: str) -> Iterator[BinaryIO]:
    """A seekable binary stream of one file. Raises UserError when it is missing."""
    filesystem, path = resolve(uri)
    try:
        stream = filesystem.open_input_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{uri}: no such file") from error
    with stream:
        yield stream


def read_bytes(uri: str) -> bytes:
    """The whole of one small file. Raises UserError when it is missing."""
    with open_input(uri) as stream:
        return stream.read()


def write_bytes(uri: str, content: bytes) -> None:
    """Write one small file whole: readers see all of it or none."""
    filesystem, path = resolve(uri)
    if not isinstance(filesystem, fs.LocalFileSystem):
        # the content is complete before the upload starts: a stream would be published even if its writer raised
        with filesystem.open_output_stream(path) as stream:
            stream.write(content)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    partial = f"{path}.{os.getpid()}.partial"
    with open(partial, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


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
    """Remove one file, if it is there."""
    filesystem, path = resolve(uri)
    if filesystem.get_file_info(path).type == fs.FileType.File:
        filesystem.delete_file(path)


def delete_folder(uri: str) -> None:
    """Remove a folder and all below it, if it is there."""
    filesystem, path = resolve(uri)
    if filesystem.get_file_info(path).type == fs.FileType.Directory:
        filesystem.delete_dir(path)


def sha256(uri: str) -> str:
    """Hex digest of one file's bytes."""
    digest = hashlib.sha256()
    with open_input(uri) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def check_writable(uri: str) -> None:
    """Raise UserError if nothing can be written below `uri`, before any work is done for it."""
    probe = join(uri, ".writable")
    try:
        write_bytes(probe, b"")
        delete_file(probe)
    except OSError as error:
        raise UserError(f"{uri}: cannot be written: {' '.join(str(error).split())}") from error


def _s3() -> fs.FileSystem:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint is None:
        return fs.S3FileSystem()
    parts = urlsplit(endpoint)
    return fs.S3FileSystem(
        endpoint_override=parts.netloc,
        scheme=parts.scheme,
        region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
        force_virtual_addressing=False,
    )
