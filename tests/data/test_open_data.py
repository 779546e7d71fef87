from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from nebula.config import Agreement, Data, Member, Model, Run
from nebula.data.corpus import find, split
from nebula.data.open import open_data
from nebula.data.prepare import prepare, unigram_entropy
from nebula.errors import UsageError

MEMBERS = {"east": Member(ranks=2, batch=4), "north": Member(ranks=1, batch=3), "west": Member(ranks=3, batch=6)}
VOCAB = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    for i in range(30):
        (root / f"{i}.txt").write_text("".join(f"document {i} has line {i * j} in it\n" for j in range(60)))
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def data(folder, partition: str = "documents", **changes) -> Data:
    return Data(path=str(folder), partition=partition, **{"seq_len": 16, "held_out": 0.1, "eval_windows": 11} | changes)


def agree(cfg: Data, seed: int = 0) -> Agreement:
    run = Run(name="test", data=cfg, seed=seed, model=Model(vocab=VOCAB))
    return Agreement(schema=1, run=run, members=MEMBERS, tokenizer="", unigram_entropy=0.0)


@pytest.fixture(scope="module")
def opened(folder, cache):
    def build(partition: str, seed: int = 0):
        cfg = data(folder, partition)
        tokenizer = prepare(cfg, VOCAB, list(MEMBERS), cache).tokenizer
        return {name: open_data(agree(cfg, seed), name, tokenizer, cache) for name in MEMBERS}

    return build


@pytest.mark.parametrize("partition", ["documents", "batch"])
def test_ranks_tile_their_clusters_batch(opened, partition):
    for name, cluster in opened(partition).items():
        whole = cluster.batch(5, 0, 1)
        assert whole.shape == (MEMBERS[name].batch, 17)
        world = MEMBERS[name].ranks
        assert torch.equal(torch.cat([cluster.batch(5, rank, world) for rank in range(world)]), whole)


def test_in_batch_partition_the_clusters_tile_one_global_batch(opened):
    clusters = opened("batch")
    whole = clusters["east"].batches.windows(5, batch=13, first=0, count=13)
    assert torch.equal(torch.cat([clusters[name].batch(5, 0, 1) for name in sorted(MEMBERS)]), whole)


def test_in_documents_partition_nobody_reads_anothers_text(opened, folder):
    cfg = data(folder)
    train = split(find(cfg), cfg, list(MEMBERS)).train
    sizes = {name: len(cluster.batches.tokens) for name, cluster in opened("documents").items()}
    assert all(train[a] != train[b] for a in MEMBERS for b in MEMBERS if a != b)
    mine = {tuple(cluster.batches.tokens[:200].tolist()) for cluster in opened("documents").values()}
    assert len(mine) == len(MEMBERS)
    assert sum(sizes.values()) < len(opened("batch")["east"].batches.tokens) + 1


def test_the_seed_of_the_run_decides_the_order(opened):
    same, other = opened("batch", 0), opened("batch", 1)
    assert torch.equal(same["east"].batch(0, 0, 1), opened("batch", 0)["east"].batch(0, 0, 1))
    assert not torch.equal(same["east"].batch(0, 0, 1), other["east"].batch(0, 0, 1))


def test_evaluation_windows_are_dealt_to_clusters_and_ranks_once(opened):
    clusters = opened("documents")
    whole = clusters["east"].held_out_WT1
    assert len(whole) == 11
    parts = [clusters[name].eval(i, 3, rank, 4) for i, name in enumerate(MEMBERS) for rank in range(4)]
    assert sorted(torch.cat(parts).tolist()) == sorted(whole.tolist())
    assert clusters["east"].eval(2, 3, 3, 4).shape == (0, 17)


def test_prepare_says_what_the_run_must_know(folder, cache):
    prepared = prepare(data(folder), VOCAB, list(MEMBERS), cache)
    assert 1 < prepared.unigram_entropy < math.log(VOCAB)
    exact = sum(
        len(c) for c in (open_data(agree(data(folder)), m, prepared.tokenizer, cache).batches.tokens for m in MEMBERS)
    )
    assert prepared.train_tokens == pytest.approx(exact, rel=0.1)
    assert 0.05 < prepared.held_out_tokens / exact < 0.2


def test_unigram_entropy():
    assert unigram_entropy(np.array([3, 3, 1, 1, 2, 2, 7, 7], np.uint16)) == pytest.approx(math.log(4))
    assert unigram_entropy(np.array([5, 5, 5, 9], np.uint16)) == pytest.approx(
        0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    )


def test_too_little_text_is_the_users_error(folder, cache):
    with pytest.raises(UsageError, match="held-out set has"):
        prepare(data(folder, seq_len=8000), VOCAB, list(MEMBERS), cache)
    cfg = data(folder, held_out=0.4, seq_len=6000)
    tokenizer = prepare(cfg, VOCAB, list(MEMBERS), cache).tokenizer
    with pytest.raises(UsageError, match="training set of cluster north"):
        open_data(agree(cfg), "north", tokenizer, cache)


def test_preparing_needs_no_torch():
    code = "import nebula.data.prepare, nebula.models.fragments, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
