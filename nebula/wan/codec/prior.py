"""What sender and receiver both know before a packet comes: the last update of the same parameters.

Deltas of consecutive rounds resemble each other, in sign and still more in size: where the last update was large the
next delta is likely to be, and rows and columns keep their scale. So the last update says, parameter by parameter,
which probabilities to code with (a *cell*, of CELLS) and which sign is the likelier one. It costs no byte on the wire.

Everything is computed with integers, comparisons, or single elementwise operations, so that any device gives the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nebula.wan.codec import kernels

BUCKETS = 8
"""Classes of a parameter's own last change, half an octave each, up to twice the mean of its slice and more."""
SPREAD = 15
"""Classes of the mean change of its row and its column together."""
CELLS = BUCKETS * SPREAD

_LIMITS = np.array([256, 362, 512, 724, 1024, 1448, 2048])
"""Half octaves around 1024: between the classes of a row's mean over the slice's mean."""
_FIXED = 16
"""Magnitudes are summed as integers of so many bits, relative to the largest."""


@dataclass(frozen=True)
class Guide:
    """Of one slice, as a matrix of `columns`: classes of its rows and columns, 0 … 7 each; `base`: the bucket 0."""

    last: NDArray[np.int16]
    """The bits of the last update in bf16, flat."""
    columns: int
    rows_R: NDArray[np.int64]
    columns_C: NDArray[np.int64]
    base: int

    def cells(self, places: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Of parameters here and there: their cells, and whether the last update was negative."""
        cells = np.empty(len(places), np.uint8)
        kernels.cells(self.last, places, self.columns, self.rows_R, self.columns_C, self.base, cells)
        return cells, self.last[places] < 0

    def contexts(self, start: int, context_of: NDArray[np.uint8], contexts: NDArray[np.uint8]) -> None:
        """Fill in `context_of` the cells of the parameters from `start` on."""
        kernels.contexts(self.last, start, self.columns, self.rows_R, self.columns_C, self.base, context_of, contexts)

    def turn(self, start: int, values: NDArray[np.int16]) -> None:
        """Change the signs, in place, where the last update was negative: one is the likelier then. Undoes itself."""
        kernels.turn(self.last, start, values)


def remember(update: Tensor) -> Tensor:
    """What is kept of an update: bf16, on its device."""
    return update.to(torch.bfloat16)


def guide(last: Tensor) -> Guide:
    """From a slice of what `remember` kept. A slice of one dim or none has one row."""
    flat = last.detach().cpu().contiguous().view(-1).view(torch.int16).numpy()
    columns = last.shape[-1] if last.dim() > 1 and flat.size else max(flat.size, 1)
    top = int(kernels.peak(flat)) >> 7
    rows_R, columns_C = np.zeros(flat.size // columns, np.int64), np.zeros(columns, np.int64)
    kernels.sums(flat, top, rows_R, columns_C)
    total = int(rows_R.sum())
    mean = np.float32(total / max(flat.size, 1) * 2.0 ** (top - 127 + 1 - _FIXED))
    base = (int(mean.view(np.int32)) >> 22) - 4
    return Guide(flat, columns, _classes(rows_R, total), _classes(columns_C, total), base)


def _classes(sums: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """Class of each sum against the mean of all, 0 … 7."""
    if not total:
        return np.zeros(len(sums), np.int64)
    return np.searchsorted(_LIMITS, sums * (1024 * len(sums)) // total).astype(np.int64)
