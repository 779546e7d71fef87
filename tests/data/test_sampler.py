from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula.data.sampler import Batches, held_out_windows

TOKENS = np.arange(101, dtype=np.uint16)


def starts(windows: torch.Tensor) -> list[int]:
    return windows[:, 0].tolist()


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_reads_every_window_once(epoch):
    windows = Batches(TOKENS, 10, seed=3).windows(epoch, batch=10, first=0, count=10)
    assert (windows.dtype, windows.shape) == (torch.int64, (10, 11))
    assert sorted(starts(windows)) == list(range(0, 100, 10))
    assert torch.equal(windows - windows[:, :1], torch.arange(11).expand(10, 11))


def test_epochs_and_seeds_have_their_own_order():
    def order(seed: int, epoch: int) -> list[int]:
        return starts(Batches(TOKENS, 10, seed).windows(epoch, batch=10, first=0, count=10))

    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 50), st.integers(1, 25), st.integers(1, 6), st.integers(0, 9))
def test_shares_tile_the_batch_whatever_was_read_before(step, batch, world, seed):
    whole = Batches(TOKENS, 10, seed).windows(step, batch=batch, first=0, count=batch)
    used = Batches(TOKENS, 10, seed)
    cuts = [batch * rank // world for rank in range(world + 1)]
    for rank in reversed(range(world)):
        part = used.windows(step, batch=batch, first=cuts[rank], count=cuts[rank + 1] - cuts[rank])
        assert torch.equal(part, whole[cuts[rank] : cuts[rank + 1]])


def test_steps_follow_each_other_without_gap():
    batches = Batches(TOKENS, 10, seed=1)
    by_three = [s for step in range(10) for s in starts(batches.windows(step, batch=3, first=0, count=3))]
    by_five = [s for step in range(6) for s in starts(batches.windows(step, batch=5, first=0, count=5))]
    assert by_three == by_five


@pytest.mark.parametrize(
    ("limit", "expected"), [(4, [0, 20, 50, 70]), (10, list(range(0, 100, 10))), (99, list(range(0, 100, 10)))]
)
def test_held_out_windows_are_spread_evenly(limit, expected):
    assert starts(held_out_windows(TOKENS, 10, limit)) == expected


def test_too_little_text_has_no_held_out_windows():
    assert held_out_windows(TOKENS[:10], 10, 4).shape == (0, 11)
