"""One suite for every kind of group."""

from __future__ import annotations

import os
import select
import signal

import pytest

from nebula.errors import NebulaError, RankFailure, UsageError
from nebula.runtime import engine, local
from nebula.runtime.engine import Ranks
from nebula.runtime.ray import RayGroup

RAY = pytest.param(("ray", 2), marks=pytest.mark.ray, id="ray-2")


@pytest.fixture(scope="module")
def launch(request):
    kind, count = request.param
    if kind == "ray":
        request.getfixturevalue("head")
    groups = {}

    def launch(note: str = "hello", cluster: str = "north"):
        """As an engine does, it ends the cluster's old group first."""
        if cluster in groups:
            groups.pop(cluster).kill()
        ranks = Ranks(count=count, settings={"note": note}, worker="fakes:FakeWorker", threads=3)
        group = local.launch(ranks) if kind == "local" else RayGroup(ranks, cluster=cluster)
        groups[cluster] = group
        return group

    launch.count = count
    yield launch
    for group in groups.values():
        group.kill()


@pytest.fixture(scope="module")
def group(launch):
    """Shared by the tests that leave it whole."""
    return launch(cluster="shared")


every = pytest.mark.parametrize(
    "launch", [pytest.param(("local", 1), id="local-1"), pytest.param(("local", 2), id="local-2"), RAY], indirect=True
)
several = pytest.mark.parametrize("launch", [pytest.param(("local", 2), id="local-2"), RAY], indirect=True)


@every
def test_results_come_in_rank_order(launch, group):
    assert group.call("whoami") == [(rank, launch.count, "hello") for rank in range(launch.count)]


@every
def test_ranks_keep_their_state_between_calls_and_rank_0_can_be_asked_alone(launch, group):
    assert group.call_first("remember", "a") == ["a"]
    assert group.call("remember", "b") == [["a", "b"], ["b"]][: launch.count]


@every
def test_references_are_passed_on_as_arguments(launch, group):
    packets = group.references("encode", "f0")
    assert len(packets) == launch.count
    assert group.call("length", packets[-1]) == [len("f0/0;") * 50_000] * launch.count


@every
@pytest.mark.parametrize("way", ["call", "references"])
def test_what_a_rank_refuses_comes_through_as_itself(launch, way):
    with pytest.raises(UsageError, match=r"rank . says no") as caught:
        getattr(launch(), way)("refuse")
    assert caught.value.hint == "ask nicely"


@every
def test_a_worker_that_cannot_be_built_says_why(launch):
    with pytest.raises(UsageError, match="the data is wrong"):
        launch(note="refuse")


@every
def test_a_crash_carries_the_rank_and_its_traceback(launch):
    with pytest.raises(NebulaError, match=r"(?s)rank . failed: KeyError: 'lost'.*fakes\.py") as caught:
        launch().call("crash")
    assert type(caught.value) is NebulaError


@several
def test_ranks_have_processes_and_threads_of_their_own(group):
    pids = group.call("pid")
    assert len({os.getpid(), *pids}) == 3
    assert group.pids() == pids
    assert group.call("threads") == ["3", "3"]


@several
@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_that_dies_is_blamed_and_the_group_can_be_built_anew(launch, culprit):
    with pytest.raises(RankFailure) as caught:
        launch().call("die", culprit)
    assert caught.value.rank == culprit
    assert launch().call("whoami") == [(0, 2, "hello"), (1, 2, "hello")]


@several
def test_a_rank_killed_between_calls_is_noticed_by_the_next(launch):
    group = launch()
    os.kill(group.pids()[1], signal.SIGKILL)
    with pytest.raises(RankFailure) as caught:
        group.call("whoami")
    assert caught.value.rank == 1


@several
def test_an_error_of_one_rank_does_not_wait_for_those_it_blocks(launch, monkeypatch):
    monkeypatch.setattr(engine, "GRACE", 0.2)
    group = launch()
    pids = group.pids()
    with pytest.raises(UsageError, match="loss is not finite"):
        group.call("hang", 1)
    for pid in pids:
        _gone(pid)


def _gone(pid: int) -> None:
    """Return when the process has ended; the test's timeout is the limit."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with os.fdopen(handle) as pidfd:
        assert select.select([pidfd], [], [], 20)[0], f"{pid} still runs"
