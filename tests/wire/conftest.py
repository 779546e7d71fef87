from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nebula.config import Blockwise, Codec, Membership, Wan, Zstd
from nebula.runtime import caller
from tests.federated import Federated, clusters, tiny, write_corpus

Federate = Callable[[Path], Federated]


@pytest.fixture(scope="package")
def federate(tmp_path_factory) -> Federate:
    """Starts the same federation of two in any folder: 4-bit updates, two fragments, two rounds."""
    folder = tmp_path_factory.mktemp("wire")
    membership = Membership(quorum=2, max_stall=60.0)
    four_bits = Codec(steps=(Blockwise(bits=4), Zstd()))
    wan = Wan(up=four_bits, down=four_bits)
    run = tiny(write_corpus(folder / "corpus"), rounds=2, inner_steps=2, membership=membership, wan=wan)
    return lambda where: Federated(run, clusters(north=1, south=1), where, folder / "cache")


@pytest.fixture(scope="package")
def in_memory(federate, tmp_path_factory) -> str:
    """The global digest that a run of `federate` ends with when there is no wire."""
    return federate(tmp_path_factory.mktemp("memory")).finish()["global_digest"]


@pytest.fixture(autouse=True)
def no_long_pauses(monkeypatch):
    monkeypatch.setattr(caller, "FIRST_PAUSE", 0.02)
