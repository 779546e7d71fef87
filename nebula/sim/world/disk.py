"""A disk in memory that loses power. It is a `nebula.files.System`, and SQLite runs on it through a VFS.

Nothing of a dead process may touch the disk, not even the `finally` and `except` clauses that run while it is unwound:
the world says `cut()` first, then unwinds, then `crash()` (power failed) or `restart()` (the process was killed, the
machine runs on and forgets nothing). Files opened and databases connected before that are of no use any more.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath

from nebula.sim.world.media import File, Folder, Node
from nebula.sim.world.vfs import SqliteFile, SqliteVfs

_names = itertools.count()


class PowerCut(BaseException):
    """Nothing runs any more: not an Exception, so that the code under test cannot handle it."""


@dataclass(slots=True)
class _Handle:
    node: Node
    writable: bool
    offset: int = 0


class SimDisk:
    """`steps`: mutating calls so far. At number `crash_at` (from 1), before its effect or after it, power is cut:
    `on_crash` is called and PowerCut raised. `full`: writes end early or raise ENOSPC."""

    def __init__(self, rng: random.Random) -> None:
        self.full = False
        self.steps = 0
        self.crash_at: int | None = None
        self.on_crash: Callable[[], None] = lambda: None
        self.locks: dict[File, dict[SqliteFile, int]] = {}
        self._rng = rng
        self._root = Folder()
        self._on = True
        self._descriptors = itertools.count(3)
        self._handles: dict[int, _Handle] = {}
        self._vfs: list[SqliteVfs] = []

    # --- what happens to it ---

    def cut(self) -> None:
        """From now on every call raises PowerCut, except `close`, which does nothing."""
        self._on = False

    def crash(self) -> None:
        """Power failed and is back: what was not fsynced is lost, kept or torn."""
        self._root.lose_power(self._rng)
        self.restart()

    def restart(self) -> None:
        """The process died and its files were closed; the machine did not."""
        self._handles.clear()
        self.locks.clear()
        self.close_vfs()
        self._on = True

    def rot(self, path: PurePath) -> None:
        """Flip a bit of what lies on the disk under `path`, if anything does."""
        self.file(path).rot(self._rng)

    def vfs(self, name: str) -> str:
        """A VFS on this disk for one life of one process, by the name that apsw.Connection wants."""
        vfs = SqliteVfs(self, f"{name}-{next(_names)}")
        self._vfs.append(vfs)
        return vfs.name

    def close_vfs(self) -> None:
        """Take all VFSes away."""
        for vfs in self._vfs:
            vfs.retire()
        self._vfs.clear()

    # --- nebula.files.System ---

    def open(self, path: PurePath, flags: int, mode: int = 0o777, /) -> int:
        self.require_power()
        node = self._find(path)
        if node is None and flags & os.O_CREAT:
            node = self.create(path)
        elif node is None:
            raise _error(errno.ENOENT, path)
        elif flags & os.O_CREAT and flags & os.O_EXCL:
            raise _error(errno.EEXIST, path)
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        if isinstance(node, Folder) and writable:
            raise _error(errno.EISDIR, path)
        if isinstance(node, File) and flags & os.O_DIRECTORY:
            raise _error(errno.ENOTDIR, path)
        if isinstance(node, File) and flags & os.O_TRUNC:
            self.change(lambda: node.truncate(0))
        descriptor = next(self._descriptors)
        self._handles[descriptor] = _Handle(node, writable)
        return descriptor

    def read(self, descriptor: int, length: int, /) -> bytes:
        handle = self._handle(descriptor)
        if isinstance(handle.node, Folder):
            raise _error(errno.EISDIR, descriptor)
        data = handle.node.read(handle.offset, length)
        handle.offset += len(data)
        return data

    def pread(self, descriptor: int, length: int, offset: int, /) -> bytes:
        node = self._handle(descriptor).node
        if isinstance(node, Folder):
            raise _error(errno.EISDIR, descriptor)
        return node.read(offset, length)

    def write(self, descriptor: int, data: bytes | memoryview, /) -> int:
        handle = self._handle(descriptor)
        if isinstance(handle.node, Folder) or not handle.writable:
            raise _error(errno.EBADF, descriptor)
        written = self.store(handle.node, handle.offset, bytes(data))
        handle.offset += written
        return written

    def fsync(self, descriptor: int, /) -> None:
        self.change(self._handle(descriptor).node.sync)

    def close(self, descriptor: int, /) -> None:
        if self._on:
            self._handle(descriptor)
            del self._handles[descriptor]

    def replace(self, source: PurePath, target: PurePath, /) -> None:
        self.require_power()
        node, old, folder = self._require(source), self._find(target), self.folder(target.parent)
        if self.folder(source.parent) is not folder:
            raise _error(errno.EXDEV, target)  # this disk renames within a folder only
        if isinstance(old, Folder) and isinstance(node, File):
            raise _error(errno.EISDIR, target)
        if isinstance(old, File) and isinstance(node, Folder):
            raise _error(errno.ENOTDIR, target)
        if node is old:
            return
        if isinstance(old, Folder) and old.names:
            raise _error(errno.ENOTEMPTY, target)
        self.change(lambda: folder.change({source.name: None, target.name: node}))

    def unlink(self, path: PurePath, /) -> None:
        self.require_power()
        folder, _ = self.folder(path.parent), self.file(path)
        self.change(lambda: folder.change({path.name: None}))

    def mkdir(self, path: PurePath, mode: int = 0o777, /) -> None:
        self.require_power()
        if self._find(path) is not None:
            raise _error(errno.EEXIST, path)
        folder, new = self.folder(path.parent), Folder()
        self.change(lambda: folder.change({path.name: new}))

    def listdir(self, path: PurePath, /) -> list[str]:
        self.require_power()
        return list(self.folder(path).names)

    def stat(self, path: PurePath, /) -> os.stat_result:
        self.require_power()
        node = self._require(path)
        if isinstance(node, Folder):
            return os.stat_result((stat.S_IFDIR | 0o755, 0, 0, 2, 0, 0, 0, 0, 0, 0))
        return os.stat_result((stat.S_IFREG | 0o644, 0, 0, 1, 0, 0, len(node.data), 0, 0, 0))

    # --- for the VFS ---

    def require_power(self) -> None:
        if not self._on:
            raise PowerCut

    def change(self, effect: Callable[[], None]) -> None:
        """One step. Raises PowerCut when its time has come."""
        self.require_power()
        self.steps += 1
        if self.steps == self.crash_at:
            if self._rng.random() < 0.5:
                effect()
            self.cut()
            self.on_crash()
            raise PowerCut
        effect()

    def store(self, file: File, offset: int, data: bytes) -> int:
        """Write, in one step. Returns how many bytes had room. Raises OSError (ENOSPC) when none had."""
        if self.full:
            data = data[: self._rng.randrange(max(len(data), 1))]
            if not data:
                raise _error(errno.ENOSPC, offset)
        self.change(lambda: file.write(offset, data))
        return len(data)

    def create(self, path: PurePath) -> File:
        folder, new = self.folder(path.parent), File()
        self.change(lambda: folder.change({path.name: new}))
        return new

    def file(self, path: PurePath) -> File:
        node = self._require(path)
        if isinstance(node, Folder):
            raise _error(errno.EISDIR, path)
        return node

    def folder(self, path: PurePath) -> Folder:
        node = self._require(path)
        if isinstance(node, File):
            raise _error(errno.ENOTDIR, path)
        return node

    # --- paths and descriptors ---

    def _find(self, path: PurePath) -> Node | None:
        """What is there, or None. Raises FileNotFoundError if the folder it would be in is missing."""
        node: Node | None = self._root
        for part in path.parts[path.is_absolute() :]:
            if node is None:
                raise _error(errno.ENOENT, path)
            if isinstance(node, File):
                raise _error(errno.ENOTDIR, path)
            node = node.names.get(part)
        return node

    def _require(self, path: PurePath) -> Node:
        node = self._find(path)
        if node is None:
            raise _error(errno.ENOENT, path)
        return node

    def _handle(self, descriptor: int) -> _Handle:
        self.require_power()
        if descriptor not in self._handles:
            raise _error(errno.EBADF, descriptor)
        return self._handles[descriptor]


def _error(code: int, what: PurePath | int) -> OSError:
    return OSError(code, os.strerror(code), str(what))
