from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from nebula import files


class Spy:
    """Module os that notes what reaches the disk, and may fail a call."""

    def __init__(self, *, failing: str = "") -> None:
        self.calls: list[tuple[str, str]] = []
        self._failing = failing
        self._open: dict[int, str] = {}

    def __getattr__(self, name: str):
        def call(*args):
            path = (
                self._open.get(args[0]) if isinstance(args[0], int) else Path(args[-1 if name == "replace" else 0]).name
            )
            self.calls.append((name, path))
            if name == self._failing:
                raise OSError(28, "no space")
            result = getattr(os, name)(*args)
            if name == "open":
                self._open[result] = path
            return result

        return call


def test_content_is_on_disk_before_it_has_its_name(tmp_path):
    spy = Spy()
    files.write(tmp_path / "file", b"ab", b"", b"c", system=spy)
    assert (tmp_path / "file").read_bytes() == b"abc"
    aside = ".file.0"
    calls = ["open", "write", "write", "fsync", "close"]
    assert spy.calls == [*((call, aside) for call in calls), ("replace", "file")]


def test_a_folder_is_synced(tmp_path):
    spy = Spy()
    files.sync(tmp_path, spy)
    assert [call for call, _ in spy.calls] == ["open", "fsync", "close"]
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        files.sync(tmp_path / "file")


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_failed_write_leaves_what_was_there(tmp_path, failing):
    files.write(tmp_path / "file", b"old")
    with pytest.raises(OSError, match="no space"):
        files.write(tmp_path / "file", b"new", system=Spy(failing=failing))
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_system_that_writes_little_at_a_time_is_asked_again(tmp_path):
    class Sluggish(Spy):
        def write(self, descriptor, data):
            return os.write(descriptor, data[:3])

    files.write(tmp_path / "file", b"0123456789", system=Sluggish())
    assert files.read(tmp_path / "file") == b"0123456789"


def test_leftovers_and_other_writers_are_not_in_the_way(tmp_path):
    (tmp_path / ".file.0").write_bytes(b"of a crash")
    files.write(tmp_path / "file", b"new")
    assert files.read(tmp_path / "file") == b"new"
    assert files.read(tmp_path / ".file.0") == b"of a crash"


def test_private_files_are_never_open_to_others(tmp_path):
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    def chunks():
        seen.append(mode(tmp_path / ".key.0"))
        yield b"secret"

    seen: list[int] = []
    files.write_all(tmp_path / "key", chunks(), private=True)
    files.write(tmp_path / "page", b"")
    assert [*seen, mode(tmp_path / "key"), mode(tmp_path / "page")] == [0o600, 0o600, 0o644]


def test_every_folder_made_has_a_durable_name(tmp_path):
    spy = Spy()
    files.make(tmp_path / "a" / "b", spy)
    assert (tmp_path / "a" / "b").is_dir()
    assert [path for call, path in spy.calls if call == "fsync"] == [tmp_path.parent.name, tmp_path.name, "a"]
    again = Spy()
    files.make(tmp_path / "a" / "b", again)
    assert [path for call, path in again.calls if call == "fsync"] == ["a"]


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        files.make(tmp_path / "file" / "b")
