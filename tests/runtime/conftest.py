from __future__ import annotations

from pathlib import Path

import pytest

from nebula.runtime.heads import Head
from nebula.runtime.ray import connect, disconnect


@pytest.fixture(scope="session")
def head(tmp_path_factory):
    """One Ray cluster for all tests that need one: a start takes seconds. This process is its driver."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # actors import the fakes
        head = Head("north", log=tmp_path_factory.mktemp("ray") / "head.log", cpus=4)
    head.start()
    try:
        head.wait()
        connect(head.address, "tests", head.token)
        yield head
        disconnect()
    finally:
        head.stop()
