from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.processes import NebulaProcess, below, summary, write_job
from tests.federated import write_corpus


@pytest.fixture(scope="session")
def job(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("job")
    return write_job(folder, write_corpus(folder / "corpus"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def reference(job, cache, tmp_path_factory) -> dict:
    """An uninterrupted run: its summary, what it said, and its folder."""
    folder = tmp_path_factory.mktemp("reference")
    recipe, clusters = job
    nebula = NebulaProcess(["run", str(recipe), "--clusters", str(clusters), "--engine", "local"], folder, cache)
    code, out = nebula.finish()
    assert code == 0, nebula.said
    told = summary(folder / "runs" / "tiny")
    return {**told, "out": out, "said": nebula.said, "run_dir": folder / "runs" / "tiny"}


@pytest.fixture
def start(tmp_path, cache):
    """Starts command lines in `tmp_path`; whatever still runs at the end of the test is ended."""
    started: list[NebulaProcess] = []

    def start(*arguments: object, **how: Any) -> NebulaProcess:
        started.append(NebulaProcess([str(a) for a in arguments], tmp_path, cache, **how))
        return started[-1]

    yield start
    for nebula in started:
        nebula.end()
    assert [pid for nebula in started for pid in below(nebula.process.pid)] == []
