"""How fast this machine codes, and how small: measured on a Gaussian sample, which deltas resemble."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from nebula.config import Codec
from nebula.planner.exchange import Cost
from nebula.wan.codec.measure import Wire, gaussian

SAMPLE = 1 << 22
"""Parameters: large enough that what a packet costs whatever its size is next to nothing."""
TURNS = 3


def measured(codec: Codec, sample: int = SAMPLE) -> Cost:
    """On one thread; the fastest of some turns."""
    tensors, coder = gaussian(sample), Wire(codec)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sent = coder.encode(tensors)  # compiles what has to be compiled
        coder.decode(sent)
        encode = min(_seconds(lambda: coder.encode(tensors)) for _ in range(TURNS))
        decode = min(_seconds(lambda: coder.decode(sent)) for _ in range(TURNS))
    finally:
        torch.set_num_threads(threads)
    count = sum(x.numel() for x in tensors.values())
    return Cost(bits=8 * len(sent) / count, encode=encode / count, decode=decode / count)


def _seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start
