from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula.config import Data
from nebula.data.corpus import BALANCE, PIECE, Document, find, split
from nebula.errors import UsageError


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def fake(name: str, size: int, start: int = 0) -> Document:
    return Document(Path("nowhere"), name, start, start + size)


# --- find ---


def test_a_folder_gives_its_texts_by_name(tmp_path):
    files = {"b/y.py": "2", "a.py": "1", "b/x.md": "3", "c.bin": "0", "empty.py": ""}
    hidden = {".git/z.py": "0", "b/__pycache__/z.py": "0", ".z.py": "0", "site-packages/z.py": "0"}
    documents = find(Data(path=str(write(tmp_path, files | hidden))))
    assert [(d.name, d.read()) for d in documents] == [("a.py", "1"), ("b/x.md", "3"), ("b/y.py", "2")]


def test_a_list_of_folders_and_files_keeps_equal_names_apart(tmp_path):
    one, two = write(tmp_path / "one", {"a.py": "1"}), write(tmp_path / "two", {"a.py": "2", "log.out": "3"})
    documents = find(Data(path=(str(one), str(two), str(two / "log.out"))))
    assert [(d.name, d.read()) for d in documents] == [("0/a.py", "1"), ("1/a.py", "2"), ("2/log.out", "3")]


def test_names_do_not_depend_on_where_the_folder_lies(tmp_path):
    files = {"a.py": "1", "b/c.py": "2"}
    here, there = (find(Data(path=str(write(tmp_path / where, files)))) for where in ("here", "there"))
    assert [(d.name, d.start, d.end) for d in here] == [(d.name, d.start, d.end) for d in there]


def test_large_files_are_cut_at_line_ends_and_lose_nothing(tmp_path):
    text = "".join(f"line {i} ü\n" for i in range(20_000))
    documents = find(Data(path=str(write(tmp_path, {"big.txt": text}) / "big.txt")))
    assert len(documents) == 1 + len(text.encode()) // (PIECE + 20)
    assert "".join(d.read() for d in documents) == text
    assert all(d.read().endswith("\n") for d in documents)


def test_bytes_that_are_not_utf8_are_replaced(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\xffb")
    assert find(Data(path=str(tmp_path)))[0].read() == "a\ufffdb"


def test_the_standard_library_is_there():
    documents = find(Data())
    names = {d.name for d in documents}
    assert {"os.py", "json/decoder.py", "test/test_os.py"} <= names
    assert not any(name.startswith(("site-packages/", "lib2to3/")) for name in names)
    assert "test/bad_coding.py" not in names
    assert sum(d.bytes for d in documents) > 20e6


@pytest.mark.parametrize(
    ("files", "path", "says"), [({}, "missing", "no such"), ({"a.bin": "1", "b.py": ""}, "", "empty")]
)
def test_nothing_to_read_is_the_users_error(tmp_path, files, path, says):
    with pytest.raises(UsageError, match=says) as caught:
        find(Data(path=str(write(tmp_path, files) / path)))
    assert "data.path" in caught.value.message
    assert caught.value.hint


# --- split ---

NAMES = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map("/".join)
DOCUMENTS = st.lists(
    st.tuples(NAMES, st.integers(0, 3), st.integers(1, 2000)), unique_by=lambda t: t[:2], min_size=2
).map(lambda rows: [fake(name, size, start) for name, start, size in rows])
MEMBERS = st.lists(st.sampled_from(["east", "north", "south", "west"]), unique=True, min_size=1)


@settings(deadline=None, max_examples=150)
@given(DOCUMENTS, MEMBERS, st.sampled_from(["documents", "batch"]), st.randoms(use_true_random=False))
def test_a_split_covers_everything_once(documents, members, partition, random):
    cfg = Data(partition=partition, held_out=0.1)
    shares = len(members) if partition == "documents" else 1
    if len(documents) <= shares:
        with pytest.raises(UsageError, match=f"{len(documents)} documents of {sum(d.bytes for d in documents)} bytes"):
            split(documents, cfg, members)
        return
    parts = split(documents, cfg, members)
    assert set(parts.train) == set(members)
    assert parts.held_out
    assert all(parts.train.values())
    given_out = [*parts.held_out, *(d for m in members[:shares] for d in parts.train[m])]
    assert sorted(map(repr, given_out)) == sorted(map(repr, documents))
    assert all(not set(parts.held_out) & set(train) for train in parts.train.values())

    shuffled = random.sample(documents, len(documents))
    assert split(shuffled, cfg, members[::-1]) == parts


def test_batch_gives_everything_to_everyone():
    parts = split([fake(f"{i}.py", 10) for i in range(10)], Data(partition="batch"), ["north", "south"])
    assert parts.train["north"] == parts.train["south"]
    assert len(parts.train["north"]) == 9


def test_units_stay_together_while_shares_are_fair():
    documents = [fake(f"{unit}/{i}.py", 100) for unit in "abcdefgh" for i in range(20)]
    parts = split(documents, Data(), ["north", "south"])
    north, south = ({d.unit(1) for d in parts.train[m]} for m in ("north", "south"))
    assert not north & south


@pytest.mark.parametrize("folders", ["", "one/", "one/deep/"])
def test_one_large_unit_is_taken_apart(folders):
    documents = [fake(f"{folders}{i}.py", 100 + i) for i in range(40)] + [
        fake("big.txt", 1000, i) for i in range(0, 9000, 1000)
    ]
    parts = split(documents, Data(), ["east", "north", "south"])
    sizes = [sum(d.bytes for d in train) for train in parts.train.values()]
    assert max(sizes) - min(sizes) <= BALANCE * sum(sizes) / 3


def test_the_held_out_share_is_close_to_what_was_asked():
    documents = [fake(f"{i}.py", 50 + i % 100) for i in range(2000)]
    held_out = split(documents, Data(held_out=0.05), ["north"]).held_out
    assert sum(d.bytes for d in held_out) / sum(d.bytes for d in documents) == pytest.approx(0.05, rel=0.05)
