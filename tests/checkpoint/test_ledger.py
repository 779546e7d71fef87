from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

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
