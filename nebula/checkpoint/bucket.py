"""Object stores, through fsspec: s3://bucket/path, and whatever else fsspec has a package for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from nebula.checkpoint.store import Folder, Store
from nebula.errors import PreflightError, UsageError

PACKAGES = {"s3": "nebula[s3]", "s3a": "nebula[s3]", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
"""What to install for a scheme."""

OBJECT_STORES = {"memory", "s3", "gcs", "abfs", "oci", "oss", "tos"}
"""fsspec's names of what has no folders, and shows an upload once it is complete and not before."""


class Bucket:
    """A Store at an fsspec URL. Where an upload is seen before it is complete (sftp://, say) a blob is written aside
    and renamed. Raises ConnectionError, which says where and why, for all that goes wrong but a missing blob."""

    def __init__(self, url: str) -> None:
        self._where = shown(url)
        self._fs, self._root = connect(url)
        if not is_object_store(self._fs):
            with explained(self._where):
                self._fs.makedirs(self._root, exist_ok=True)

    def __str__(self) -> str:
        return self._where

    def put(self, name: str, data: bytes) -> None:
        target, aside = self._path(name), self._path(f".{name}")
        try:
            with explained(self._where):
                if is_object_store(self._fs):
                    self._fs.pipe_file(target, data)
                else:
                    self._fs.pipe_file(aside, data)
                    self._fs.mv(aside, target)
        except FileNotFoundError as error:
            raise ConnectionError(f"{self._where} cannot be written: {error}") from error

    def get(self, name: str) -> bytes:
        with explained(self._where):
            return bytes(self._fs.cat_file(self._path(name)))

    def read(self, name: str, offset: int, length: int) -> bytes:
        with explained(self._where):
            return bytes(self._fs.cat_file(self._path(name), start=offset, end=offset + length))

    def names(self) -> list[str]:
        return [name for name in entries(self._fs, self._root, self._where) if not name.startswith(".")]

    def size(self, name: str) -> int:
        with explained(self._where):
            return int(self._fs.size(self._path(name)))

    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError), explained(self._where):
            self._fs.rm_file(self._path(name))

    def sweep(self) -> None:
        for name in entries(self._fs, self._root, self._where):
            if name.startswith("."):
                self.delete(name)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def open_store(where: str | Path) -> Store:
    """A folder, or an fsspec URL. Raises UsageError and PreflightError as `connect`."""
    fs, root = connect(where)
    return Folder(Path(root)) if isinstance(fs, LocalFileSystem) else Bucket(str(where))


def connect(where: str | Path) -> tuple[AbstractFileSystem, str]:
    """The file system that a path or URL is on, and the path by which that knows it. Nothing is contacted yet.

    Raises UsageError if the URL's scheme is unknown, PreflightError if the package for it is missing here."""
    scheme, url, _ = str(where).partition("://")
    if not url:
        return LocalFileSystem(), str(Path(where).absolute())
    try:
        # What another rank wrote must be seen at once, so listings are not cached.
        fs, root = url_to_fs(str(where), use_listings_cache=False)
    except ImportError as error:
        package = PACKAGES.get(scheme)
        hint = f"pip install '{package}'" if package else f"install what fsspec asks for: {error}"
        raise PreflightError(
            f"{shown(where)}: {scheme}:// needs a package that is not here ({error})", hint=hint
        ) from error
    except ValueError as error:
        hint = "give a folder, or a URL that fsspec knows, such as s3://bucket/path"
        raise UsageError(f"{shown(where)} cannot be used: {error}", hint=hint) from error
    return fs, root.rstrip("/")


def is_object_store(fs: AbstractFileSystem) -> bool:
    names = {fs.protocol} if isinstance(fs.protocol, str) else {*fs.protocol}
    return bool(names & OBJECT_STORES)


def entries(fs: AbstractFileSystem, root: str, where: str) -> list[str]:
    """Names of the files and folders in `root`, sorted; none if it is not there. An object store without the bucket is
    an error, for then nothing can be kept there either."""
    with explained(where):
        try:
            paths = fs.ls(root, detail=False)
        except FileNotFoundError:
            bucket = root.partition("/")[0]
            if is_object_store(fs) and not fs.exists(bucket):
                raise ConnectionError(f"there is no bucket {bucket!r}") from None
            return []
    return sorted(path.rstrip("/").rpartition("/")[2] for path in paths if path.rstrip("/") != root)


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Each package behind fsspec raises errors of its own: a missing object is a FileNotFoundError, all else becomes a
    ConnectionError that names the place."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ConnectionError(f"{where} cannot be used: {reason}") from error


def shown(where: str | Path) -> str:
    """Without the user and password that a URL may have."""
    return re.sub(r"(?<=://)[^/@]*@", "", str(where))
