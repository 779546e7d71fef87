from __future__ import annotations

from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs
from tokenizers import Tokenizer

from nebula import files
from nebula.data import tokens
from nebula.data.corpus import Document
from nebula.data.tokenizer import END, train
from nebula.errors import UsageError

TEXTS = ["import os\n" * 30, f"a text that says {END} in the middle\n", "x = 1\n" * 9]


@pytest.fixture
def corpus(tmp_path) -> list[Document]:
    paths = [tmp_path / f"{i}.txt" for i in range(len(TEXTS))]
    for path, text in zip(paths, TEXTS, strict=True):
        path.write_text(text)
    return [Document(path, path.name, 0, path.stat().st_size) for path in paths]


@pytest.fixture
def vocabulary(corpus) -> str:
    return train(corpus, 280)


def test_documents_come_back_each_ended_once(corpus, vocabulary, tmp_path):
    found = tokens.tokenize(corpus, vocabulary, tmp_path / "cache")
    assert found.dtype == np.uint16
    ends = np.flatnonzero(found == 0)
    assert ends[-1] == len(found) - 1
    decode = Tokenizer.from_str(vocabulary).decode
    assert [decode(part[part != 0].tolist()) for part in np.split(found, ends)[:-1]] == TEXTS


def test_the_cache_is_used_and_is_read_only(corpus, vocabulary, tmp_path, monkeypatch):
    first = tokens.tokenize(corpus, vocabulary, tmp_path / "cache").copy()
    monkeypatch.setattr(tokens, "_encode", lambda *_: pytest.fail("encoded again"))
    again = tokens.tokenize(corpus, vocabulary, tmp_path / "cache")
    assert np.array_equal(again, first)
    with pytest.raises(ValueError, match="read-only"):
        again[0] = 1


def test_other_text_or_tokenizer_is_another_file(corpus, vocabulary, tmp_path):
    cache = tmp_path / "cache"
    before = tokens.tokenize(corpus, vocabulary, cache).copy()
    corpus[2].path.write_text("y = 2\n" * 9)
    assert not np.array_equal(tokens.tokenize(corpus, vocabulary, cache), before)
    assert len(tokens.tokenize(corpus, train(corpus, 257), cache)) > len(before)


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:5], lambda b: b"", lambda b: b"X" + b[1:]])
def test_a_damaged_file_is_rebuilt_and_said_so(corpus, vocabulary, tmp_path, damage):
    cache = tmp_path / "cache"
    whole = tokens.tokenize(corpus, vocabulary, cache).copy()
    (path,) = cache.glob("tokens-*.bin")
    path.write_bytes(damage(path.read_bytes()))
    with capture_logs() as logs:
        again = tokens.tokenize(corpus, vocabulary, cache)
    assert np.array_equal(again, whole)
    assert [entry["log_level"] for entry in logs] == ["warning"]


def test_large_vocabularies_take_four_bytes(corpus, vocabulary, tmp_path):
    large = Tokenizer.from_str(vocabulary)
    large.add_tokens([f"token {i}" for i in range(2**16)])
    found = tokens.tokenize(corpus, large.to_str(), tmp_path / "cache")
    assert found.dtype == np.uint32
    assert np.array_equal(found, tokens.tokenize(corpus, vocabulary, tmp_path / "cache"))


def test_require_wants_one_whole_window():
    tokens.require(np.zeros(9, np.uint16), 8, "the set")
    with pytest.raises(UsageError, match="the set has 8 tokens"):
        tokens.require(np.zeros(8, np.uint16), 8, "the set")


# --- files ---


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    files.write(path, b"old")

    def failing():
        yield b"new"
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        files.write_all(path, failing())
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]


def test_one_process_at_a_time_holds_the_lock(tmp_path):
    """Several add one to a number in a file; without the lock some additions are lost."""
    number = tmp_path / "number"
    number.write_text("0")
    context = get_context("fork")
    workers = [context.Process(target=_add, args=(tmp_path, 200)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert number.read_text() == "600"


def _add(folder: Path, times: int) -> None:
    for _ in range(times):
        with files.lock(folder / "lock"):
            value = int((folder / "number").read_text())
            (folder / "number").write_text(str(value + 1))
