"""Coordinators and clusters that move: to another machine, out of a run, and into it again."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable

import postgres
import pytest

from nebula.cli.prepare import prepare, resolve
from nebula.cli.rundir import RunDir
from nebula.runtime.heads import free_port
from nebula.types import COORDINATOR
from tests.e2e.processes import NebulaProcess, Start, Watch, summary

NORTH, SOUTH = "north", "south"


@pytest.fixture
def prepared(job, cache, tmp_path, monkeypatch) -> Callable[..., RunDir]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return lambda *overrides: prepare(*resolve(*job, overrides), tmp_path / "runs")


def agent(start: Start, run: RunDir, name: str, port: int) -> NebulaProcess:
    arguments = {
        "--clusters": run.path / "federation.json",
        "--coordinator": f"127.0.0.1:{port}",
        "--identity": run.identity(name),
        "--agreement": run.agreement().digest(),
        "--out": run.path,
        "--engine": "local",
    }
    return start("agent", name, *(word for pair in arguments.items() for word in pair))


@pytest.mark.machine("postgres")
def test_a_coordinator_that_dies_is_replaced_on_another_machine(prepared, start, tmp_path, reference):
    """Of the first machine nothing is left but what lies in PostgreSQL and in the store that both can reach."""
    run, port = prepared(), free_port()
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(run.path, elsewhere)
    with postgres.running() as server:
        shared = ("--journal", server.url(), "--blobs", tmp_path / "shared")
        first = start("coordinator", run.path, "--port", port, *shared)
        Watch(run.path, first).until(COORDINATOR, event="run_started")
        second = start("coordinator", elsewhere, "--port", free_port(), *shared)
        assert second.finish()[0] == 1, "there is one already"
        assert "in use by another coordinator" in "\n".join(second.said)
        agents = [agent(start, run, name, port) for name in (NORTH, SOUTH)]
        Watch(run.path, first, *agents).until(SOUTH, phase="pushing", round=2)
        os.kill(first.process.pid, signal.SIGKILL)
        third = start("coordinator", elsewhere, "--port", port, *shared)
        assert [process.finish()[0] for process in (third, *agents)] == [0, 0, 0], third.said
        assert not run.summary.exists()
        told = summary(elsewhere)
        assert (told["state"], told["global_digest"]) == ("completed", reference["global_digest"])
        code, out = start("ckpt", "verify", elsewhere, *shared, "--json").finish()
        assert code == 0, out
        assert server.url() not in "\n".join(first.said + second.said + third.said)


def test_a_cluster_that_is_told_to_go_is_not_waited_for_and_may_come_back(prepared, start):
    run, port = prepared("membership.quorum=1", "rounds=100000", "evaluate_every=100000"), free_port()
    hub = start("coordinator", run.path, "--port", port)
    north, south = (agent(start, run, name, port) for name in (NORTH, SOUTH))
    watch = Watch(run.path, hub, north)
    watch.until(COORDINATOR, event="commit", contributors=[NORTH, SOUTH])
    south.process.send_signal(signal.SIGTERM)
    watch.until(COORDINATOR, event="left", cluster=SOUTH)
    assert south.finish()[0] == 143
    watch.until(COORDINATOR, event="commit", contributors=[NORTH])
    again = agent(start, run, SOUTH, port)
    watch.until(COORDINATOR, event="commit", contributors=[NORTH, SOUTH])
    hub.interrupt()
    assert [process.finish()[0] for process in (hub, north, again)] == [0, 0, 0]
    assert summary(run.path)["clusters"][SOUTH]["rejoins"] == 1
