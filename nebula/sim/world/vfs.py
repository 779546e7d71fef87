"""SQLite on a SimDisk. As SQLite's own VFS for Unix, it makes the name of a new journal or WAL durable with the first
sync of its content; it promises nothing about the device (no atomic writes, no safe append, no powersafe overwrite).

There is no shared memory: WAL needs `locking_mode=EXCLUSIVE`.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING, cast

import apsw

from nebula.sim.world.media import SECTOR, File

if TYPE_CHECKING:
    from nebula.sim.world.disk import SimDisk

_JOURNALS = apsw.SQLITE_OPEN_MAIN_JOURNAL | apsw.SQLITE_OPEN_SUPER_JOURNAL | apsw.SQLITE_OPEN_WAL
_UNUSED = {"xDlOpen", "xDlSym", "xDlClose", "xDlError", "xGetSystemCall", "xSetSystemCall", "xNextSystemCall"}
_REFUSED_FROM = {
    apsw.SQLITE_LOCK_SHARED: apsw.SQLITE_LOCK_PENDING,
    apsw.SQLITE_LOCK_RESERVED: apsw.SQLITE_LOCK_RESERVED,
    apsw.SQLITE_LOCK_EXCLUSIVE: apsw.SQLITE_LOCK_SHARED,
}
"""The weakest lock of another connection that refuses this one."""

_A_DAY = 2_460_000.5  # Julian; nothing here asks SQLite for the time


class SqliteVfs(apsw.VFS):
    """Of one life of a process: once retired, it and its files do not touch the disk any more."""

    def __init__(self, disk: SimDisk, name: str) -> None:
        super().__init__(name, exclude=_UNUSED)
        self.name = name
        self._disk: SimDisk | None = disk

    def disk(self) -> SimDisk:
        """Raises PowerCut, or apsw.IOError in what is left of a former life."""
        if self._disk is None:
            raise apsw.IOError("the process that opened this database is dead")
        self._disk.require_power()
        return self._disk

    def retire(self) -> None:
        self._disk = None
        self.unregister()

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:
        flags[1] = flags[0]
        path = None if name is None else PurePosixPath(name if isinstance(name, str) else name.filename())
        return cast("apsw.VFSFile", self._open(path, flags[0]))  # any object with these methods will do

    def _open(self, path: PurePosixPath | None, flags: int) -> SqliteFile:
        disk = self.disk()
        if path is None:  # a temporary file
            return SqliteFile(self, File(), None)
        # Also for a journal that is there: a process that was killed may have left it without a durable name.
        unsynced = path.parent if flags & _JOURNALS and flags & apsw.SQLITE_OPEN_CREATE else None
        try:
            return SqliteFile(self, disk.file(path), unsynced)
        except FileNotFoundError:
            if not flags & apsw.SQLITE_OPEN_CREATE:
                raise apsw.CantOpenError(f"{path} does not exist") from None
        return SqliteFile(self, disk.create(path), unsynced)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        disk, path = self.disk(), PurePosixPath(filename)
        try:
            disk.unlink(path)
        except FileNotFoundError:
            raise apsw.exception_for(apsw.SQLITE_IOERR_DELETE_NOENT) from None
        if syncdir:
            disk.change(disk.folder(path.parent).sync)

    def xAccess(self, pathname: str, flags: int) -> bool:
        try:
            self.disk().file(PurePosixPath(pathname))
        except FileNotFoundError:
            return False
        return True

    def xFullPathname(self, name: str) -> str:
        return str(PurePosixPath("/", name))

    def xRandomness(self, numbytes: int) -> bytes:
        return bytes(numbytes)

    def xCurrentTime(self) -> float:
        return _A_DAY

    def xGetLastError(self) -> tuple[int, str]:
        return 0, ""


class SqliteFile:
    """`unsynced`: the folder to sync with the content, because this name may not be durable in it."""

    def __init__(self, vfs: SqliteVfs, file: File, unsynced: PurePosixPath | None) -> None:
        self._vfs = vfs
        self._file = file
        self._unsynced = unsynced
        self._locks = vfs.disk().locks.setdefault(file, {})

    def xRead(self, amount: int, offset: int) -> bytes:
        self._vfs.disk()
        return self._file.read(offset, amount)

    def xWrite(self, data: bytes, offset: int) -> None:
        while data:
            try:
                written = self._vfs.disk().store(self._file, offset, data)
            except OSError as error:
                raise apsw.FullError(error.strerror) from error
            data, offset = data[written:], offset + written

    def xTruncate(self, newsize: int) -> None:
        self._vfs.disk().change(lambda: self._file.truncate(newsize))

    def xSync(self, flags: int) -> None:
        disk = self._vfs.disk()
        disk.change(self._file.sync)
        if self._unsynced is not None:
            disk.change(disk.folder(self._unsynced).sync)
            self._unsynced = None

    def xFileSize(self) -> int:
        self._vfs.disk()
        return len(self._file.data)

    def xLock(self, level: int) -> None:
        self._vfs.disk()
        if self._strongest_other() >= _REFUSED_FROM[level]:
            raise apsw.BusyError("another connection has the database")
        self._locks[self] = level

    def xUnlock(self, level: int) -> None:
        self._locks[self] = level

    def xCheckReservedLock(self) -> bool:
        return self._strongest_other() >= apsw.SQLITE_LOCK_RESERVED

    def _strongest_other(self) -> int:
        return max((level for file, level in self._locks.items() if file is not self), default=apsw.SQLITE_LOCK_NONE)

    def xFileControl(self, op: int, ptr: int) -> bool:
        return False

    def xSectorSize(self) -> int:
        return SECTOR

    def xDeviceCharacteristics(self) -> int:
        return 0

    def xClose(self) -> None:
        self._locks.pop(self, None)
