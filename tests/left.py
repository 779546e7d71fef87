"""What a coordinator leaves behind after some rounds, without the rounds: real merges of made-up deltas."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from nebula.checkpoint.ledger import Ledger
from nebula.checkpoint.store import Folder
from nebula.clock import REAL
from nebula.config import Agreement
from nebula.federation.events import Arrived, Merge
from nebula.federation.journal import Journal
from nebula.federation.merge import Merger
from nebula.types import Slice
from nebula.wan.codec.pipeline import Encoder
from nebula.wan.frame import pack


def lead(journal: Journal, blobs: Path, agreement: Agreement, rounds: int = 3) -> None:
    """Commit `rounds` rounds, and take a delta of the next one. Leaves the journal open."""
    generator = torch.Generator().manual_seed(0)
    ledger = Ledger(Folder(blobs))
    merger = Merger(agreement, ledger, REAL)
    for committed in merger.found():
        journal.append(committed)
    for round in range(rounds + 1):
        for fragment, shapes in merger.shapes.items():
            arrivals = []
            for cluster in sorted(agreement.members) if round < rounds else ["north"]:
                delta = _delta(agreement, shapes, generator)
                arrived = Arrived(
                    cluster=cluster,
                    fragment=fragment,
                    round=round,
                    weight=10.0,
                    blob=ledger.put(delta),
                    parts=(len(delta),),
                    seconds=1.0,
                )
                journal.append(arrived)
                arrivals.append(arrived)
            if round < rounds:
                journal.append(merger.merge(Merge(fragment, round + 1, tuple(arrivals))))


def _delta(agreement: Agreement, shapes: Mapping[str, tuple[int, ...]], generator: torch.Generator) -> bytes:
    tensors = {name: 1e-2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    whole = {Slice(name, (0,) * len(shapes[name]), tuple(shapes[name])): tensor for name, tensor in tensors.items()}
    return pack(Encoder(agreement.run.wan.up).encode(whole))
