from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.processes import NebulaProcess, below, write_job
from tests.federated import write_corpus


@pytest.fixture(scope="session")
def job(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("job")
    return write_job(folder, write_corpus(folder / "corpus"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def start(tmp_path, cache):
    """Starts command lines in `tmp_path`; whatever still runs at the end of the test is ended."""
    started: list[NebulaProcess] = []

    def start(*arguments: object) -> NebulaProcess:
        started.append(NebulaProcess([str(a) for a in arguments], tmp_path, cache))
        return started[-1]

    yield start
    for nebula in started:
        if nebula.process.poll() is None:
            nebula.process.terminate()
            nebula.process.communicate()
        assert below(nebula.process.pid) == []
