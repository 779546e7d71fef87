from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from nebula.data import tokenizer
from nebula.data.corpus import Document
from nebula.errors import UsageError


def documents(folder: Path, texts: list[str]) -> list[Document]:
    found = []
    for i, text in enumerate(texts):
        path = folder / f"{i}.txt"
        path.write_bytes(text.encode())
        found.append(Document(path, path.name, 0, path.stat().st_size))
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[Document]:
    return documents(
        tmp_path_factory.mktemp("corpus"), [f"def f{i}(self): return self.x + {i}\n" * 20 for i in range(9)]
    )


@pytest.fixture(scope="module")
def trained(corpus) -> Tokenizer:
    return Tokenizer.from_str(tokenizer.train(corpus, 300))


@settings(deadline=None, max_examples=100)
@given(text=st.text())
def test_any_text_survives(trained, text):
    trained.encode_special_tokens = True
    assert trained.decode(trained.encode(text).ids, skip_special_tokens=False) == text


def test_it_compresses_what_it_was_trained_on(trained, corpus):
    text = corpus[0].read()
    assert len(trained.encode(text).ids) < len(text) / 2


def test_end_is_token_zero_and_the_vocabulary_is_bounded(trained):
    assert trained.token_to_id(tokenizer.END) == 0
    assert 257 < trained.get_vocab_size() <= 300


def test_training_is_deterministic_in_any_order(corpus):
    assert tokenizer.train(corpus, 300) == tokenizer.train(corpus[::-1], 300)


def test_a_vocabulary_without_room_for_all_bytes_is_refused(corpus):
    with pytest.raises(UsageError, match="256"):
        tokenizer.train(corpus, 256)


def test_cached_trains_once_per_text_and_vocabulary(corpus, tmp_path, monkeypatch):
    calls = []
    train = tokenizer.train
    monkeypatch.setattr(tokenizer, "train", lambda d, v: calls.append(v) or train(d, v))
    first = tokenizer.cached(corpus, 300, tmp_path)
    assert tokenizer.cached(corpus, 300, tmp_path) == first == train(corpus, 300)
    assert calls == [300]
    tokenizer.cached(corpus, 290, tmp_path)
    tokenizer.cached(corpus[:-1], 300, tmp_path)
    assert calls == [300, 290, 300]
