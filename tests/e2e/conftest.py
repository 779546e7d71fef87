from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from nebula import files
from tests.e2e.processes import NebulaProcess, below, summary, write_job
from tests.federated import write_corpus


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder of the whole session, whichever of its processes runs a test."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "e2e"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def cache(shared) -> Path:
    return shared / "cache"


@pytest.fixture(scope="session")
def job(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("job")
    return write_job(folder, write_corpus(folder / "corpus"))


@pytest.fixture(scope="session")
def reference(job, shared, cache) -> dict:
    """An uninterrupted run: its summary, what it said, and its folder."""
    folder, (recipe, clusters) = shared / "reference", job
    run_dir, told = folder / "runs" / "tiny", folder / "told.json"
    with files.lock(shared / "lock"):
        if not told.exists():
            folder.mkdir()
            nebula = NebulaProcess(
                ["run", str(recipe), "--clusters", str(clusters), "--engine", "local"], folder, cache
            )
            code, out = nebula.finish()
            assert code == 0, nebula.said
            told.write_text(json.dumps({"out": out, "said": nebula.said}))
    return {**summary(run_dir), **json.loads(told.read_text()), "run_dir": run_dir}


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
