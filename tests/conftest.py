from __future__ import annotations

from collections.abc import Iterator

import pytest
from machine import missing
from ranks import Ranks

LEFT_OUT = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--machine", action="store_true", help="fail if something is missing that tests marked `machine` need"
    )


@pytest.hookimpl(trylast=True)  # what -m and -k have left
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what this machine cannot run, and say so; with --machine that is an error."""
    lacking = {item: missing(need for mark in item.iter_markers("machine") for need in mark.args) for item in items}
    left_out = [item for item in items if lacking[item]]
    if not left_out:
        return
    found = f"{len(left_out)} tests marked `machine` need what is missing here: "
    found += ", ".join(sorted({need for needs in lacking.values() for need in needs}))
    if config.getoption("--machine"):
        raise pytest.UsageError(f"{found} (make machine)")
    items[:] = [item for item in items if not lacking[item]]
    config.hook.pytest_deselected(items=left_out)
    config.stash[LEFT_OUT] = f"left out: {found}"


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    return [config.stash[LEFT_OUT]] if LEFT_OUT in config.stash else []


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    pool.close()
