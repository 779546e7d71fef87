"""Whole runs over the memory transport: what one round promises (design rules 1-7)."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest
import torch

from nebula.config import SGD, Blockwise, Codec, Membership, OuterSGD, Wan, Zstd
from nebula.errors import PreflightError, RankFailure, SessionError
from nebula.federation.journal_sqlite import SqliteJournal
from nebula.federation.memory import MemoryStub
from nebula.federation.merge import read_state
from nebula.models.init import initial
from nebula.wan.link import Wire
from tests.federated import TINY, Federated, clusters, one_process, run_together, tiny, write_corpus

PLAIN = Codec(steps=(), feedback=None)
FOUR_BIT = Codec(steps=(Blockwise(bits=4, block=64), Zstd()), feedback=1.0)
EIGHT_BIT = Codec(steps=(Blockwise(bits=8, block=64), Zstd()), feedback=1.0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def both_needed(run):
    return run.model_copy(update={"membership": Membership(quorum=2, max_stall=60.0)})


def parameters(hub) -> dict[str, torch.Tensor]:
    state = {}
    for fragment in hub.state.fragments.values():
        state |= read_state(hub._ledger.get(fragment.commit.blobs["params"]))
    return state


# --- sameness -----------------------------------------------------------------------------------------------------


def data_parallel(corpus, **changes):
    """inner_steps=1, no compression, plain SGD inside, outer SGD with rate 1: DiLoCo is then data parallelism."""
    return both_needed(
        tiny(
            corpus,
            data={"partition": "batch"},
            optimizer=SGD(lr=0.3),
            outer=OuterSGD(lr=1.0),
            wan=Wan(up=PLAIN, down=PLAIN),
            inner_steps=1,
            rounds=4,
            **changes,
        )
    )


@pytest.mark.parametrize(
    "layout",
    [{"north": 1, "south": 1}, pytest.param({"north": 2, "south": 1}, marks=pytest.mark.slow, id="unequal-layouts")],
)
def test_two_clusters_equal_one_process_on_the_full_batch(layout, corpus, cache, tmp_path):
    federated = Federated(data_parallel(corpus), clusters(**layout), tmp_path, cache)
    federated.finish()
    expected = one_process(federated.agreement, federated.tokenizer, cache)
    moved = {name: initial(name, tuple(t.shape), TINY, 0) for name, t in expected.items()}
    assert max(float((expected[n] - moved[n]).abs().max()) for n in expected) > 1e-2  # it did learn something
    for name, tensor in parameters(federated.hub).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


# --- rule 2: bit-identical global state ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "ranks"),
    [(FOUR_BIT, 1), (EIGHT_BIT, 1), (PLAIN, 1), (FOUR_BIT, 2)],
    ids=["4-bit", "8-bit", "fp32", "4-bit, unequal layouts"],
)
def test_everyone_reports_the_same_digest_in_each_round(codec, ranks, corpus, cache, tmp_path):
    run = both_needed(tiny(corpus, wan=Wan(up=codec, down=codec)))
    federated = Federated(run, clusters(north=ranks, south=1), tmp_path, cache)
    seen: dict[str, list] = {}
    agents = {name: federated.agent(name) for name in ("north", "south")}
    for name, agent in agents.items():
        seen[name] = record_digests(agent)
    summary = federated.finish(agents)
    commits = sorted((e["fragment"], e["version"], e["digest"]) for e in federated.events("commit"))
    assert sorted(seen["north"]) == sorted(seen["south"]) == commits
    assert len(commits) == 3 * 2
    assert len({digest for _, _, digest in commits}) == len(commits)
    assert federated.events("alarm") == []
    assert summary["state"] == "completed"


def record_digests(agent) -> list[tuple[str, int, str]]:
    """What the ranks themselves computed after each update."""
    digests: list[tuple[str, int, str]] = []
    push = agent.engine.push

    def spy(fragment, kind, payload, *, merged):
        digest = push(fragment, kind, payload, merged=merged)
        digests.append((fragment, agent.held[fragment].version + 1, digest))
        return digest

    agent.engine.push = spy
    return digests


def test_a_cluster_that_diverges_raises_an_alarm_and_is_set_right(corpus, cache, tmp_path):
    federated = Federated(both_needed(tiny(corpus)), clusters(north=1, south=1), tmp_path, cache)
    agents = {name: federated.agent(name) for name in ("north", "south")}
    save = agents["north"].engine.save

    def then_flip_a_bit(tag, held):
        save(tag, held)
        if tag == 1:  # as a cosmic ray would, in the copy of the global parameters that one rank holds
            exchange = agents["north"].engine._group._worker.exchange
            exchange._base[exchange.fragments["f1"][0]].view(torch.int32).view(-1)[0] ^= 1

    agents["north"].engine.save = then_flip_a_bit
    federated.finish(agents)
    (alarm,) = federated.events("alarm")
    assert (alarm["kind"], alarm["cluster"], alarm["detail"]) == ("digest_mismatch", "north", "f1")
    assert agents["north"].held == agents["south"].held


# --- rules 1, 3, 6, 7: nothing is lost ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(corpus, cache, tmp_path_factory):
    run = both_needed(tiny(corpus))
    federated = Federated(run, clusters(north=1, south=1), tmp_path_factory.mktemp("reference"), cache)
    return federated.finish()


@pytest.mark.parametrize("crash_after", range(2, 16, 3))
def test_a_coordinator_killed_at_any_journal_step_ends_with_the_same_digest(
    crash_after, corpus, cache, tmp_path, uninterrupted, monkeypatch
):
    federated = Federated(both_needed(tiny(corpus)), clusters(north=1, south=1), tmp_path, cache)
    agents = {name: federated.agent(name) for name in ("north", "south")}
    first, written = federated.hub, []
    append = SqliteJournal.append

    def failing(journal, event):
        written.append(event)
        if journal is first._journal and len(written) > crash_after:
            raise OSError(errno.EIO, "pulled the plug")
        append(journal, event)

    monkeypatch.setattr(SqliteJournal, "append", failing)
    replacing = Replacing(federated)
    for agent in agents.values():
        agent.transport._caller.stub = replacing
    summary = federated.finish(agents)
    assert federated.hub is not first
    assert summary["global_digest"] == uninterrupted["global_digest"]
    assert summary["tokens"] == uninterrupted["tokens"]
    assert summary["loss"] == uninterrupted["loss"]


class Replacing:
    """A stub in front of a coordinator that may die: calls fail like a broken connection, and the first one to see it
    dead starts another on the same journal, as a supervisor would."""

    def __init__(self, federated: Federated) -> None:
        self._federated = federated
        self._lock = threading.Lock()

    def wire(self):
        return Wire(0, 0, 0, available=False)

    def __getattr__(self, method):
        def call(request, timeout, **lane):
            with self._lock:
                if self._federated.hub._failure is not None:
                    self._federated.hub.close()
                    self._federated.start_hub()
            hub = self._federated.hub
            try:
                answer = getattr(MemoryStub(hub), method)(request, timeout, **lane)
                return answer if method == "join" else iter(list(answer))
            except Exception as error:
                if hub._failure is None:
                    raise
                raise SessionError(f"the coordinator died: {error}") from error

        return call


@pytest.mark.parametrize("moment", ["training", "delivered", "saved"])
def test_a_cluster_killed_and_started_again_ends_with_the_same_digest(moment, corpus, cache, tmp_path, uninterrupted):
    federated = Federated(both_needed(tiny(corpus)), clusters(north=1, south=1), tmp_path, cache)
    doomed = federated.agent("north")
    break_at(doomed, moment)
    joined = {}

    def north():
        with pytest.raises(Killed):
            doomed.run()
        joined["north"] = federated.agent("north")
        joined["north"].run()

    joined["south"] = federated.agent("south")
    run_together({"north": north, "south": joined["south"].run})
    assert federated.hub.global_digest() == uninterrupted["global_digest"]
    assert joined["north"].held == joined["south"].held


class Killed(BaseException):
    """Like SIGKILL, nothing of ours catches it."""


def break_at(agent, moment: str) -> None:
    engine = agent.engine
    if moment == "training":
        train = engine.train

        def broken_train(steps):
            if steps.round == 1:
                raise Killed
            return train(steps)

        engine.train = broken_train
    elif moment == "delivered":  # both deltas are with the coordinator, the updates are not applied yet
        push = engine.push

        def broken_push(fragment, *rest, **more):
            if agent.held[fragment].version == 1:
                raise Killed
            return push(fragment, *rest, **more)

        engine.push = broken_push
    else:
        save = engine.save

        def broken_save(tag, held):
            save(tag, held)
            if tag == 2:
                raise Killed

        engine.save = broken_save


def test_a_rank_that_dies_costs_a_rebuild_and_nothing_else(corpus, cache, tmp_path, uninterrupted):
    federated = Federated(both_needed(tiny(corpus)), clusters(north=1, south=1), tmp_path, cache)
    agents = {name: federated.agent(name) for name in ("north", "south")}
    train, failures = agents["south"].engine.train, []

    def failing(steps):
        if steps.round == 1 and not failures:
            failures.append(steps.round)
            raise RankFailure(0, "rank 0 was killed")
        return train(steps)

    agents["south"].engine.train = failing
    summary = federated.finish(agents)
    assert agents["south"].rebuilds == 1
    assert summary["global_digest"] == uninterrupted["global_digest"]


def test_a_cluster_that_lost_its_disk_catches_up_from_the_coordinator(corpus, cache, tmp_path):
    run = tiny(corpus, rounds=4, membership=Membership(quorum=1, max_stall=0.5))
    federated = Federated(run, clusters(north=1, south=1), tmp_path, cache)
    north = federated.agent("north")
    stop_after(north, 2)
    with pytest.raises(Killed):
        tick_while(federated, north.run)
    late = federated.agent("south")
    again = federated.agent("north")
    tick_while(federated, lambda: run_together({"north": again.run, "south": late.run}))
    assert again.held == late.held
    assert {h.version for h in late.held.values()} == {4}
    contributors = {tuple(e["contributors"]) for e in federated.events("commit")}
    assert ("north",) in contributors


def stop_after(agent, rounds: int) -> None:
    save = agent.engine.save

    def then_die(tag, held):
        save(tag, held)
        if tag == rounds:
            raise Killed

    agent.engine.save = then_die


def tick_while(federated: Federated, act) -> None:
    """Let the coordinator's clock tick while `act` runs, as its process does."""
    done = threading.Event()

    def ticking():
        while not done.wait(0.02):
            federated.hub.tick()

    ticker = threading.Thread(target=ticking)
    ticker.start()
    try:
        act()
    finally:
        done.set()
        ticker.join()


def test_stop_and_resume_equals_an_uninterrupted_run(corpus, cache, tmp_path, uninterrupted):
    federated = Federated(both_needed(tiny(corpus)), clusters(north=1, south=1), tmp_path, cache)
    agents = {name: federated.agent(name) for name in ("north", "south")}
    save = agents["north"].engine.save

    def stop_at_first(tag, held):
        save(tag, held)
        if tag == 1:
            federated.hub.stop("a test asks")

    agents["north"].engine.save = stop_at_first
    assert federated.finish(agents)["state"] == "stopped"
    assert federated.hub.state.round < 3
    federated.hub.close()
    federated.start_hub()
    summary = federated.finish()
    assert summary["state"] == "completed"
    assert summary["global_digest"] == uninterrupted["global_digest"]
    assert summary["loss"] == uninterrupted["loss"]
    assert summary["eval_loss"] == uninterrupted["eval_loss"]


def test_a_full_disk_ends_the_coordinator_without_acknowledging(corpus, cache, tmp_path, monkeypatch):
    federated = Federated(both_needed(tiny(corpus)), clusters(north=1, south=1), tmp_path, cache)

    def full(data):
        raise OSError(errno.ENOSPC, "No space left on device")

    agents = {name: federated.agent(name, federated.gateway(name, max_stall=1.0)) for name in ("north", "south")}
    monkeypatch.setattr(federated.hub._ledger, "put", full)
    with pytest.raises(PreflightError, match="disk is full"):
        run_together({name: agent.run for name, agent in agents.items()})
    with pytest.raises(PreflightError, match="disk is full"):
        federated.hub.tick()
    assert all(not f.arrived for f in federated.hub.state.fragments.values())
