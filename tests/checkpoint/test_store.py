from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from nebula.checkpoint.store import Folder
from nebula.sim.world.disk import SimDisk


@pytest.fixture(params=["os", "simulated"])
def place(request, tmp_path) -> tuple:
    """A path, and the system it is on."""
    if request.param == "os":
        return tmp_path / "run" / "blobs", os
    return Path("/run/blobs"), SimDisk(random.Random(0))


def test_blobs_by_name(place):
    store = Folder(*place)
    assert store.names() == []
    store.put("b", b"first")
    store.put("a", b"")
    store.put("b", bytes(range(256)) * 9)
    assert store.names() == ["a", "b"]
    assert [store.get(name) for name in "ab"] == [b"", bytes(range(256)) * 9]
    assert [store.size(name) for name in "ab"] == [0, 2304]
    store.delete("a")
    store.delete("a")
    assert store.names() == ["b"]
    assert Folder(*place).get("b") == store.get("b")
    assert str(store) == str(place[0])


def test_a_part_of_a_blob(place):
    store = Folder(*place)
    store.put("a", bytes(range(100)))
    parts = [store.read("a", at, 30) for at in range(0, 100, 30)]
    assert [len(part) for part in parts] == [30, 30, 30, 10]
    assert b"".join(parts) == bytes(range(100))


def test_what_is_missing_is_said_to_be(place):
    store = Folder(*place)
    for look in (store.get, store.size, lambda name: store.read(name, 0, 1)):
        with pytest.raises(FileNotFoundError):
            look("none")


def test_a_sweep_takes_what_was_half_written_and_nothing_else(place):
    path, system = place
    store = Folder(path, system)
    store.put("kept", b"x")
    system.close(system.open(path / ".kept.0", os.O_WRONLY | os.O_CREAT, 0o600))
    assert store.names() == ["kept"]
    store.sweep()
    assert system.listdir(path) == ["kept"]


def test_a_full_disk_leaves_what_was_there():
    disk = SimDisk(random.Random(0))
    store = Folder(Path("/blobs"), disk)
    store.put("a", b"old" * 1000)
    disk.full = True
    for _ in range(20):
        with pytest.raises(OSError, match="No space") as error:
            store.put("a", b"new" * 1000)
        assert error.value.errno == errno.ENOSPC
    assert disk.listdir(Path("/blobs")) == ["a"]
    assert store.get("a") == b"old" * 1000
    disk.full = False
    store.put("a", b"new")
    assert store.get("a") == b"new"
