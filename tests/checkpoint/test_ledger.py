from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from nebula.checkpoint import ledger as ledger_module
from nebula.checkpoint.ledger import Ledger
from nebula.checkpoint.store import Folder
from nebula.errors import JournalError
from nebula.sim.world.disk import PowerCut, SimDisk

BLOBS = Path("/run/blobs")


def ledger_on(disk: SimDisk) -> Ledger:
    return Ledger(Folder(BLOBS, disk))


def test_a_name_is_the_hash_of_the_content(tmp_path):
    ledger = Ledger(Folder(tmp_path))
    name = ledger.put(b"state")
    assert name == hashlib.sha256(b"state").hexdigest()
    assert ledger.put(b"state") == name
    assert (ledger.get(name), ledger.size(name)) == (b"state", 5)
    assert ledger.get(ledger.put(b"")) == b""


def test_what_is_kept_stays_and_the_rest_goes(tmp_path):
    ledger = Ledger(Folder(tmp_path))
    kept, dropped = ledger.put(b"kept"), ledger.put(b"dropped")
    ledger.keep({kept})
    assert [path.name for path in tmp_path.iterdir()] == [kept]
    with pytest.raises(JournalError, match=f"{dropped[:12]}… is missing from {tmp_path}"):
        ledger.get(dropped)
    assert ledger.put(b"dropped") == dropped
    assert ledger.get(dropped) == b"dropped"


def test_a_process_begins_with_what_is_live_and_later_drops_only_what_it_knows(tmp_path):
    earlier = Ledger(Folder(tmp_path))
    live, _ = earlier.put(b"live"), earlier.put(b"dead")
    (tmp_path / ".half-written").touch()
    ledger = Ledger(Folder(tmp_path))
    ledger.begin({live})
    assert [path.name for path in tmp_path.iterdir()] == [live]
    own, of_a_later_one = ledger.put(b"own"), Ledger(Folder(tmp_path)).put(b"later")
    ledger.keep({own})
    assert {path.name for path in tmp_path.iterdir()} == {own, of_a_later_one}


def test_rot_is_noticed_and_healed_by_the_next_process():
    disk = SimDisk(random.Random(0))
    ledger = ledger_on(disk)
    name = ledger.put(b"state" * 100)
    disk.rot(BLOBS / name)
    with pytest.raises(JournalError, match="corrupt"):
        ledger.get(name)
    again = ledger_on(disk)
    again.put(b"state" * 100)
    assert again.get(name) == b"state" * 100


@pytest.mark.parametrize("seed", range(5))
def test_a_blob_that_was_put_is_there_after_any_power_failure(seed):
    """Also if a process that was killed had left it in the page cache only."""
    for crash_at in range(1, 30):
        disk = SimDisk(random.Random(seed * 100 + crash_at))
        disk.crash_at = crash_at
        blobs = [b"a" * 3000, b"b" * 100]
        try:
            ledger = ledger_on(disk)
            for blob in blobs:
                ledger.put(blob)
        except PowerCut:
            disk.restart()  # killed, and started again on a machine that ran on
            ledger = ledger_on(disk)
            ledger.put(blobs[0])
            del blobs[1:]
        disk.crash_at = None
        disk.cut()
        disk.crash()
        found = ledger_on(disk)
        assert [found.get(hashlib.sha256(blob).hexdigest()) for blob in blobs] == blobs


# --- chunks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def chunk_bytes(monkeypatch) -> int:
    monkeypatch.setattr(ledger_module, "CHUNK_BYTES", 100)
    return 100


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("length", [1, 99, 100, 101, 250])
def test_a_blob_in_chunks(length, tmp_path):
    ledger, data = Ledger(Folder(tmp_path)), random.Random(length).randbytes(length)
    name = ledger.put(data)
    chunks = [data[at : at + 100] for at in range(0, length, 100)]
    assert ledger.chunks(name) == tuple(hashlib.sha256(chunk).digest() for chunk in chunks)
    assert [ledger.chunk(name, sha256) for sha256 in ledger.chunks(name)] == chunks
    with pytest.raises(KeyError):
        ledger.chunk(name, b"another")


class Reads(Folder):
    """Counts them."""

    read_bytes = 0

    def read(self, name: str, offset: int, length: int) -> bytes:
        data = super().read(name, offset, length)
        self.read_bytes += len(data)
        return data


@pytest.mark.usefixtures("chunk_bytes")
def test_chunks_are_hashed_once_while_the_blob_lives(tmp_path):
    store = Reads(tmp_path)
    ledger, data = Ledger(store), bytes(range(250))
    name = ledger.put(data)
    for _ in range(3):
        ledger.chunks(name)
    assert store.read_bytes == 250
    ledger.chunk(name, ledger.chunks(name)[2])
    assert store.read_bytes == 300
    ledger.keep([name])
    ledger.chunks(name)
    assert store.read_bytes == 300
    ledger.keep([])
    with pytest.raises(JournalError, match="missing"):
        ledger.chunks(name)


def test_what_is_lent_stays(tmp_path):
    ledger = Ledger(Folder(tmp_path))
    live, lent, dead = ledger.put(b"live"), ledger.put(b"lent"), ledger.put(b"dead")
    ledger.lent = {lent}
    ledger.keep([live])
    assert {path.name for path in tmp_path.iterdir()} == {live, lent}
    ledger.lent = ()
    ledger.keep([live])
    assert [path.name for path in tmp_path.iterdir()] == [live]
    assert not (tmp_path / dead).exists()


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("when", ["before the chunks are known", "after"])
@pytest.mark.parametrize("how", ["a bit flipped", "cut off", "gone", "unreadable"])
def test_damage_is_noticed_before_a_chunk_leaves(when, how, tmp_path):
    ledger, data = Ledger(Folder(tmp_path)), bytes(range(250))
    name = ledger.put(data)
    last = hashlib.sha256(data[200:]).digest()
    if when == "after":
        assert ledger.chunks(name)[2] == last
    path = tmp_path / name
    if how == "a bit flipped":
        path.write_bytes(data[:-1] + b"\xff")
    elif how == "cut off":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    if how == "unreadable":
        path.mkdir()
    with pytest.raises(JournalError, match=r"corrupt|missing|cannot be read"):
        ledger.chunk(name, last)


def test_a_place_that_cannot_be_reached_is_no_damage(tmp_path, monkeypatch):
    def unreachable(*_):
        raise ConnectionError("no route")

    ledger = Ledger(Folder(tmp_path))
    name = ledger.put(b"state")
    for method in ("get", "read", "size"):
        monkeypatch.setattr(Folder, method, unreachable)
    for look in (ledger.get, ledger.chunks, ledger.size):
        with pytest.raises(ConnectionError, match="no route"):
            look(name)
