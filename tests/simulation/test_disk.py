"""The simulated disk: a POSIX file system as long as power is on; and the judge of who forgot an fsync."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import apsw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula import files
from nebula.federation.events import Joined
from nebula.federation.journal_sqlite import SqliteJournal
from nebula.sim.world.disk import PowerCut, SimDisk
from nebula.sim.world.media import SECTOR, File, Folder

ROOT = Path("/")


def disk_of(seed: int) -> SimDisk:
    return SimDisk(random.Random(seed))


def put(disk: SimDisk, path: Path, data: bytes) -> None:
    files.write(path, data, system=disk)
    files.sync(path.parent, disk)


def lose_power(disk: SimDisk) -> None:
    disk.crash_at = None
    disk.cut()
    disk.crash()


def attempt(act: Callable[[], object]) -> bool:
    """Whether power lasted."""
    try:
        act()
    except PowerCut:
        return False
    return True


def every_step(seeds: int, act: Callable[[SimDisk], object]) -> Iterator[tuple[SimDisk, bool]]:
    """Disks on which power failed at step 1, 2, … of `act`, and then one on which it lasted, for each seed."""
    for seed in range(seeds):
        for step in itertools.count(1):
            disk = disk_of(seed * 10_000 + step)
            disk.crash_at = step
            lasted = attempt(lambda disk=disk: act(disk))
            lose_power(disk)
            yield disk, lasted
            if lasted:
                break


# --- as long as power is on ---

NAMES = st.sampled_from(["a", "b", "a/x", "a/y", "a/x/z", "none/x"])
CALLS = st.one_of(
    st.tuples(st.just("mkdir"), NAMES),
    st.tuples(st.just("listdir"), NAMES),
    st.tuples(st.just("size"), NAMES),
    st.tuples(st.just("unlink"), NAMES),
    st.tuples(st.just("read"), NAMES),
    st.tuples(st.just("sync"), NAMES),
    st.tuples(st.just("write"), NAMES, st.sampled_from([b"", b"short", b"long" * 500])),
    st.tuples(st.just("append"), NAMES, st.sampled_from([os.O_CREAT, os.O_CREAT | os.O_EXCL, os.O_TRUNC, 0])),
    st.permutations(["a/x", "a/y"]).map(lambda names: ("replace", *names)),
    st.sampled_from([("replace", "a", "b"), ("replace", "b", "a"), ("replace", "a", "a")]),
)


def outcome(system: files.System, root: Path, call: str, name: str, *rest) -> object:
    """What a call returns, or the kind of error it raises."""

    def append(flags: int) -> bytes:
        descriptor = system.open(root / name, os.O_RDWR | flags)
        head = system.read(descriptor, 3)
        system.write(descriptor, b"tail")
        system.fsync(descriptor)
        system.close(descriptor)
        return head

    acts = {
        "mkdir": lambda: system.mkdir(root / name),
        "listdir": lambda: sorted(system.listdir(root / name)),
        "size": lambda: os.path.stat.S_ISDIR((found := system.stat(root / name)).st_mode) or found.st_size,
        "unlink": lambda: system.unlink(root / name),
        "read": lambda: files.read(root / name, system),
        "sync": lambda: files.sync(root / name, system),
        "write": lambda: files.write(root / name, *rest, system=system),
        "append": lambda: append(*rest),
        "replace": lambda: system.replace(root / name, root / rest[0]),
    }
    try:
        return acts[call]()
    except OSError as error:
        return type(error)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(CALLS, max_size=12))
def test_it_behaves_as_the_file_system_of_this_machine(tmp_path_factory, calls):
    here, disk = tmp_path_factory.mktemp("real"), disk_of(0)
    for call in calls:
        assert outcome(disk, ROOT, *call) == outcome(os, here, *call), call


def test_a_closed_or_foreign_descriptor_is_refused():
    disk = disk_of(0)
    reader = disk.open(ROOT, os.O_RDONLY)
    for act in (lambda: disk.write(reader, b"x"), lambda: disk.read(reader, 1), lambda: disk.close(99)):
        with pytest.raises(OSError, match=r"Bad file descriptor|Is a directory"):
            act()
    disk.close(reader)
    with pytest.raises(OSError, match="Bad file descriptor"):
        disk.fsync(reader)


# --- what a power failure leaves ---


def torn(seed: int, before: bytes, offset: int, written: bytes) -> bytes:
    file = File()
    file.write(0, before)
    file.sync()
    file.write(offset, written)
    file.lose_power(random.Random(seed))
    return file.read(0, 1 << 20)


def test_sectors_are_whole_and_any_may_be_missing():
    before, after = b"o" * 6 * SECTOR, b"n" * 6 * SECTOR
    found = {torn(seed, before, 0, after) for seed in range(300)}
    patterns = set()
    for image in found:
        sectors = [image[at : at + SECTOR] for at in range(0, len(image), SECTOR)]
        assert set(sectors) <= {b"o" * SECTOR, b"n" * SECTOR}
        assert len(sectors) == 6
        patterns.add(tuple(sector[:1] == b"n" for sector in sectors))
    assert {(False,) * 6, (True,) * 6, (True,) * 3 + (False,) * 3} <= patterns
    assert any(later and not sooner for pattern in patterns for sooner, later in itertools.pairwise(pattern))


def test_a_file_may_grow_without_its_bytes():
    """And then zeros are there, or what the sectors held before."""
    before, after = b"o" * 100, b"n" * 3 * SECTOR
    found = [torn(seed, before, 100, after) for seed in range(1000)]
    assert all(image.startswith(before) for image in found)
    assert {len(image) for image in found} >= {100, SECTOR, 100 + 3 * SECTOR}
    holes = {image[100:] for image in found if len(image) == 100 + 3 * SECTOR and b"nnnn" not in image}
    assert bytes(3 * SECTOR) in holes
    assert len(holes) > 1


def test_what_was_synced_is_safe_and_order_is_not():
    def survivors(seed: int) -> tuple[bool, bool]:
        file = File()
        file.write(0, b"s" * SECTOR)
        file.truncate(SECTOR - 2)
        file.sync()
        file.write(SECTOR, b"1" * SECTOR)
        file.write(2 * SECTOR, b"2" * SECTOR)
        file.lose_power(random.Random(seed))
        assert file.read(0, SECTOR - 2) == b"s" * (SECTOR - 2)
        return b"1" in file.data, b"2" in file.data

    assert {survivors(seed) for seed in range(60)} == set(itertools.product([False, True], repeat=2))


def test_renames_are_atomic_and_names_wait_for_the_sync_of_their_folder():
    def survivors(seed: int) -> tuple[str, ...]:
        old, new, folder = File(), File(), Folder()
        folder.change({"target": old})
        folder.sync()
        folder.change({"aside": new})
        folder.change({"aside": None, "target": new})
        folder.lose_power(random.Random(seed))
        assert set(folder.names.values()) <= {old, new}
        return tuple(sorted(name + (" new" if node is new else "") for name, node in folder.names.items()))

    assert {survivors(seed) for seed in range(60)} == {("target",), ("aside new", "target"), ("target new",)}


def test_a_folder_without_a_durable_name_takes_all_with_it():
    def survives(seed: int, make: Callable[[Path, SimDisk], None]) -> bool:
        disk = disk_of(seed)
        make(ROOT / "run", disk)
        put(disk, ROOT / "run" / "file", b"x")
        lose_power(disk)
        return "run" in disk.listdir(ROOT) and files.read(ROOT / "run" / "file", disk) == b"x"

    assert {survives(seed, files.make) for seed in range(20)} == {True}
    assert {survives(seed, lambda path, disk: disk.mkdir(path)) for seed in range(20)} == {True, False}


def test_equal_seeds_leave_equal_disks():
    def left(seed: int) -> list[bytes]:
        disk = disk_of(seed)
        for name in "abcd":
            put(disk, ROOT / name, b"0" * 2000)
            disk.write(disk.open(ROOT / name, os.O_WRONLY), b"1" * 3000)
        lose_power(disk)
        return [files.read(ROOT / name, disk) for name in "abcd"]

    assert left(1) == left(1)
    assert len({b"".join(left(seed)) for seed in range(9)}) > 3


def test_a_dead_process_does_not_touch_the_disk_while_it_is_unwound():
    disk = disk_of(0)
    told = []
    disk.on_crash = lambda: told.append(disk.steps)
    disk.crash_at = 2  # the write; `files.write` then wants to remove the file
    assert not attempt(lambda: files.write(ROOT / "file", b"x", system=disk))
    assert told == [2]
    assert not attempt(lambda: disk.listdir(ROOT))
    disk.restart()
    assert disk.listdir(ROOT) == [".file.0"]
    assert disk.steps == 2


def test_descriptors_end_with_the_process():
    disk = disk_of(0)
    descriptor = disk.open(ROOT / "file", os.O_WRONLY | os.O_CREAT)
    disk.cut()
    disk.close(descriptor)
    disk.restart()
    with pytest.raises(OSError, match="Bad file descriptor"):
        disk.write(descriptor, b"x")


def test_a_full_disk_takes_a_part_or_nothing():
    disk = disk_of(0)
    descriptor = disk.open(ROOT / "file", os.O_WRONLY | os.O_CREAT)
    disk.full = True
    taken = []

    def fill() -> None:
        while True:
            taken.append(disk.write(descriptor, b"x" * 1000))

    with pytest.raises(OSError, match="No space"):
        fill()
    assert sum(taken) == disk.stat(ROOT / "file").st_size
    assert taken
    assert set(taken) <= set(range(1, 1000))


# --- files ---


class Forgetful:
    """A disk whose user forgets to sync files, or folders."""

    def __init__(self, disk: SimDisk, forgotten: int) -> None:
        self._disk, self._forgotten = disk, forgotten
        self._skipped: set[int] = set()

    def __getattr__(self, name: str):
        return getattr(self._disk, name)

    def open(self, path, flags, mode=0o777, /):
        descriptor = self._disk.open(path, flags, mode)
        if bool(flags & os.O_DIRECTORY) == bool(self._forgotten & os.O_DIRECTORY):
            self._skipped.add(descriptor)
        return descriptor

    def fsync(self, descriptor, /):
        if descriptor not in self._skipped:
            self._disk.fsync(descriptor)


def losses(seeds: int, system: Callable[[SimDisk], files.System]) -> list[str]:
    """What went wrong with a file that is written twice, whenever power fails."""
    versions = [None, b"old" * 500, b"new" * 500]
    wrong = []

    def act(disk: SimDisk) -> None:
        acknowledged[:] = [None]
        for data in versions[1:]:
            put(system(disk), ROOT / "file", data)  # type: ignore[arg-type]
            acknowledged.append(data)

    acknowledged: list[bytes | None] = []
    for disk, _ in every_step(seeds, act):
        found = files.read(ROOT / "file", disk) if "file" in disk.listdir(ROOT) else None
        if found not in versions:
            wrong.append("torn")
        elif versions.index(found) < len(acknowledged) - 1:
            wrong.append("lost")
    return wrong


def test_a_file_is_old_or_new_at_every_step_and_durable_when_written():
    assert losses(25, lambda disk: disk) == []


@pytest.mark.parametrize(("forgotten", "found"), [(os.O_RDONLY, "torn"), (os.O_DIRECTORY, "lost")])
def test_a_forgotten_fsync_is_found_within_a_few_seeds(forgotten, found):
    assert set(losses(3, lambda disk: Forgetful(disk, forgotten))) == {found}


# --- SQLite ---


WAL = ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "wal_autocheckpoint=4")


def rows_written(disk: SimDisk, pragmas: Sequence[str], acknowledged: list[int]) -> None:
    """Two lives of a process that adds rows; small checkpoints, so that power fails within those as well."""
    for _ in range(2):
        db = apsw.Connection("/db", vfs=disk.vfs("rows"))
        for pragma in pragmas:
            db.execute(f"PRAGMA {pragma}")
        db.execute("CREATE TABLE IF NOT EXISTS rows (n INTEGER PRIMARY KEY, body TEXT)")
        for _ in range(6):
            n = len(acknowledged)
            db.execute("INSERT INTO rows VALUES (?, ?)", (n, str(n) * 700))
            acknowledged.append(n)
        db.close()


def database_losses(seeds: int, *pragmas: str) -> set[str]:
    """What was found wrong with a database after power failed at any step, once more while it was opened again."""

    def act(disk: SimDisk) -> None:
        acknowledged.clear()
        rows_written(disk, pragmas, acknowledged)

    def look(disk: SimDisk) -> tuple[str, list[tuple]]:
        db = apsw.Connection("/db", vfs=disk.vfs("rows"))
        db.execute("PRAGMA locking_mode=EXCLUSIVE")
        state = db.pragma("integrity_check")
        exists = db.execute("SELECT count(*) FROM sqlite_master").get
        rows = db.execute("SELECT n, body FROM rows ORDER BY n").fetchall() if exists else []
        db.close()
        return state, rows

    acknowledged: list[int] = []
    wrong = set()
    for disk, _ in every_step(seeds, act):
        disk.crash_at = disk.steps + 1 + disk.steps % 7
        try:
            if not attempt(lambda disk=disk: look(disk)):
                lose_power(disk)
            disk.crash_at = None
            state, rows = look(disk)
        except apsw.Error:
            wrong.add("unreadable")
            continue
        if state != "ok" or rows != [(n, str(n) * 700) for n in range(len(rows))]:
            wrong.add("damaged")
        elif not len(acknowledged) <= len(rows) <= len(acknowledged) + 1:
            wrong.add("lost")
    return wrong


def test_with_full_sync_no_committed_row_is_lost_at_any_step():
    assert database_losses(5, *WAL, "synchronous=FULL") == set()


def test_with_less_sync_the_losses_are_found_within_a_few_seeds():
    """NORMAL may lose the last rows; OFF may also lose the database."""
    assert database_losses(2, *WAL, "synchronous=NORMAL") == {"lost"}
    assert database_losses(2, *WAL, "synchronous=OFF") >= {"lost", "damaged"}


def test_a_rollback_journal_that_comes_back_is_found():
    """Without WAL a commit is the removal of the journal, which EXTRA makes durable and FULL does not."""
    assert database_losses(1, "journal_mode=DELETE", "synchronous=EXTRA") == set()
    assert database_losses(1, "journal_mode=DELETE", "synchronous=FULL") == {"lost"}


def journal(disk: SimDisk) -> SqliteJournal:
    return SqliteJournal("/run/journal.sqlite", agreement="sha256:a", vfs=disk.vfs("coordinator"))


def joined(n: int) -> Joined:
    return Joined(cluster="north", epoch=n)


def test_the_journal_loses_nothing_at_any_step():
    """Nor what a killed process had appended and the next one, on a machine that ran on, has read."""

    def act(disk: SimDisk) -> None:
        seen.clear()
        files.make(ROOT / "run", disk)
        for n in range(3):
            log = journal(disk)
            seen[:] = list(log.replay())
            log.append(joined(n))
            seen.append(joined(n))
            del log
            disk.cut()
            disk.restart()

    seen: list[Joined] = []
    for disk, lasted in every_step(4, act):
        files.make(ROOT / "run", disk)
        found = list(journal(disk).replay())
        assert found[: len(seen)] == seen
        assert len(found) <= len(seen) + 1
        assert not lasted or len(found) == 3
        assert found == [joined(n) for n in range(len(found))]


@pytest.mark.parametrize("seed", range(3))
def test_what_a_killed_process_did_not_sync_is_durable_once_the_next_has_read_it(seed):
    for step in itertools.count(1):
        disk = disk_of(seed * 10_000 + step)
        files.make(ROOT / "run", disk)
        disk.crash_at = disk.steps + step
        killed = not attempt(lambda disk=disk: journal(disk).append(joined(0)))
        disk.crash_at = None
        disk.cut()
        disk.restart()
        log = journal(disk)
        read = list(log.replay())
        if step % 2:
            log.append(joined(1))
            read.append(joined(1))
        lose_power(disk)
        assert list(journal(disk).replay()) == read
        if not killed:
            break


def test_a_second_connection_is_refused_until_the_first_is_gone():
    disk = disk_of(0)
    name = disk.vfs("rows")
    first, second = (apsw.Connection("/db", vfs=name) for _ in range(2))
    first.execute("CREATE TABLE t (n)")
    first.execute("BEGIN IMMEDIATE")
    with pytest.raises(apsw.BusyError):
        second.execute("INSERT INTO t VALUES (1)")
    first.execute("COMMIT")
    second.execute("BEGIN EXCLUSIVE")
    with pytest.raises(apsw.BusyError):
        first.execute("SELECT * FROM t").fetchall()
    disk.cut()
    disk.restart()
    third = apsw.Connection("/db", vfs=disk.vfs("rows"))
    third.execute("INSERT INTO t VALUES (2)")
    with pytest.raises(apsw.IOError, match="dead"):
        first.execute("SELECT * FROM t").fetchall()


def test_a_full_disk_stops_the_journal_and_damages_nothing():
    disk = disk_of(0)
    files.make(ROOT / "run", disk)
    log = journal(disk)
    log.append(joined(0))
    for n in range(1, 20):
        disk.full = True
        with pytest.raises(apsw.FullError):
            log.append(joined(n))
        disk.full = False
        log.append(joined(n))
    assert list(log.replay()) == [joined(n) for n in range(20)]
    lose_power(disk)
    assert list(journal(disk).replay()) == [joined(n) for n in range(20)]


def test_a_vfs_is_gone_with_its_disk():
    disk = disk_of(0)
    name = disk.vfs("rows")
    assert name in apsw.vfs_names()
    disk.close_vfs()
    assert name not in apsw.vfs_names()
