"""Which windows a step reads: a pure function of the step, so that the step number is the whole data position and a
resumed run reads on where it stopped."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nebula.data.tokens import Tokens


class Batches:
    """An endless sequence of windows of `seq_len` + 1 tokens, which overlap by that one. Every epoch is a permutation
    of all windows; `seed` decides which. `tokens` must hold at least one window."""

    def __init__(self, tokens: Tokens, seq_len: int, seed: int) -> None:
        self.tokens = tokens
        self.seq_len = seq_len
        self.seed = seed
        self.epoch_windows = windows_in(tokens, seq_len)
        assert self.epoch_windows > 0

    def windows(self, step: int, *, batch: int, first: int, count: int) -> Tensor:
        """Samples `first` … `first + count` − 1 of the `batch` that `step` reads; int64, [count, seq_len + 1]."""
        sample = step * batch + first + np.arange(count)
        epochs, places = np.divmod(sample, self.epoch_windows)
        chosen = [_order(self.seed, int(e), self.epoch_windows)[p] for e, p in zip(epochs, places, strict=True)]
        return _take(self.tokens, self.seq_len, np.array(chosen, np.int64))


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    order = np.random.default_rng((seed, epoch)).permutation(count)
    order.setflags(write=False)
    return order


def held_out_windows(tokens: Tokens, seq_len: int, limit: int) -> Tensor:
    """At most `limit` windows, evenly spread over `tokens`; int64, [≤ limit, seq_len + 1]."""
    count = windows_in(tokens, seq_len)
    wanted = min(limit, count)
    return _take(tokens, seq_len, np.arange(wanted) * count // max(wanted, 1))


def windows_in(tokens: Tokens, seq_len: int) -> int:
    return max(0, (len(tokens) - 1) // seq_len)


def _take(tokens: Tokens, seq_len: int, windows: npt.NDArray[np.int64]) -> Tensor:
    places = windows[:, None] * seq_len + np.arange(seq_len + 1)
    return torch.from_numpy(tokens[places].astype(np.int64))
