from __future__ import annotations

import sys
from unittest.mock import patch

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from nebula.checkpoint.bucket import Bucket, connect, open_store
from nebula.checkpoint.ledger import Ledger
from nebula.checkpoint.store import Folder
from nebula.errors import JournalError, PreflightError, UsageError


@pytest.fixture(params=["memory", "s3", "file"])
def url(request, tmp_path) -> str:
    """Where nothing is yet. file:// stands for what shows uploads before they are complete, such as sftp://."""
    if request.param == "s3":
        return f"s3://{request.getfixturevalue('s3').bucket}/{tmp_path.name}/blobs"
    return f"file://{tmp_path}/a/blobs" if request.param == "file" else f"memory://{tmp_path.name}/blobs"


def test_blobs_by_name(url):
    store = Bucket(url)
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
    assert str(store) == url


def test_what_one_wrote_another_sees_at_once(url):
    one, other = Bucket(url), Bucket(url)
    one.put("a", b"x")
    assert other.names() == ["a"]
    one.put("b", b"yy")
    assert (other.names(), other.size("b"), other.get("b")) == (["a", "b"], 2, b"yy")
    one.delete("a")
    assert other.names() == ["b"]


def test_a_part_of_a_blob(url):
    store = Bucket(url)
    store.put("a", bytes(range(100)))
    parts = [store.read("a", at, 30) for at in range(0, 100, 30)]
    assert [len(part) for part in parts] == [30, 30, 30, 10]
    assert b"".join(parts) == bytes(range(100))


def test_what_is_missing_is_said_to_be(url):
    store = Bucket(url)
    for look in (store.get, store.size, lambda name: store.read(name, 0, 1)):
        with pytest.raises(FileNotFoundError):
            look("none")


def test_a_sweep_takes_what_was_half_written_and_nothing_else(url):
    store = Bucket(url)
    store.put("kept", b"x")
    fs, root = connect(url)
    fs.pipe_file(f"{root}/.kept", b"hal")
    assert store.names() == ["kept"]
    store.sweep()
    assert [path.rpartition("/")[2] for path in fs.find(root)] == ["kept"]
    assert store.get("kept") == b"x"


def test_where_uploads_are_seen_before_they_are_complete_a_blob_is_renamed(tmp_path):
    store = Bucket(f"file://{tmp_path}/blobs")
    store.put("a", b"old")
    fs, _ = connect(tmp_path)

    def half(path: str, data: bytes) -> None:
        fs.open(path, "wb").write(data[:3])
        raise RuntimeError("the link broke")

    with patch.object(type(fs), "pipe_file", staticmethod(half)), pytest.raises(ConnectionError, match="link broke"):
        store.put("a", b"newer")
    assert (store.names(), store.get("a")) == (["a"], b"old")
    store.put("a", b"newer")
    assert store.get("a") == b"newer"


def test_a_ledger_lives_there_too(url):
    store = Bucket(url)
    ledger = Ledger(store)
    kept, dropped = ledger.put(b"kept"), ledger.put(b"dropped")
    ledger.keep({kept})
    assert store.names() == [kept]
    with pytest.raises(JournalError, match=f"{dropped[:12]}… is missing from {url}"):
        ledger.get(dropped)
    store.put(kept, b"tampered")
    with pytest.raises(JournalError, match="corrupt"):
        ledger.get(kept)


def test_a_folder_or_a_url(url, tmp_path):
    expected = Folder if url.startswith("file") else Bucket
    assert isinstance(open_store(url), expected)
    for folder in (tmp_path / "blobs", str(tmp_path / "blobs")):
        store = open_store(folder)
        assert (type(store), str(store)) == (Folder, str(tmp_path / "blobs"))


def test_without_the_bucket_nothing_can_be_kept(s3):
    store = Bucket("s3://elsewhere/blobs")
    with pytest.raises(ConnectionError, match=r"s3://elsewhere/blobs.* no bucket 'elsewhere'"):
        store.names()
    with pytest.raises(ConnectionError, match=r"s3://elsewhere/blobs cannot be written"):
        store.put("a", b"x")


def test_whatever_a_package_raises_is_explained():
    store = Bucket("memory://explained")
    with (
        patch.object(MemoryFileSystem, "cat_file", side_effect=RuntimeError("token expired")),
        pytest.raises(ConnectionError, match=r"memory://explained cannot be used: token expired"),
    ):
        store.get("a")


def without(patch: pytest.MonkeyPatch, scheme: str, module: str) -> None:
    """As on a machine where a package is not installed."""
    patch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    patch.setitem(sys.modules, module, None)


@pytest.mark.parametrize(
    ("scheme", "module", "package"), [("s3", "s3fs", "nebula[s3]"), ("gs", "gcsfs", "gcsfs"), ("az", "adlfs", "adlfs")]
)
def test_a_missing_package_is_named_with_what_installs_it(monkeypatch, scheme, module, package):
    without(monkeypatch, scheme, module)
    with pytest.raises(PreflightError, match=f"{scheme}://bucket/blobs") as told:
        open_store(f"{scheme}://bucket/blobs")
    assert told.value.hint == f"pip install '{package}'"


def test_a_password_in_a_url_is_not_shown(monkeypatch):
    without(monkeypatch, "sftp", "paramiko")
    with pytest.raises(PreflightError, match="sftp://host/blobs") as told:
        open_store("sftp://me:secret@host/blobs")
    assert "secret" not in told.value.message + told.value.hint
    assert "paramiko" in told.value.hint


def test_a_scheme_that_nobody_knows():
    with pytest.raises(UsageError, match="carrier-pigeon") as told:
        open_store("carrier-pigeon://loft/blobs")
    assert "s3://" in told.value.hint
