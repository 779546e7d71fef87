"""Kills, pauses, partitions, lost packets, wrong clocks and a full disk, in real runs of real processes. A run that
needs all its clusters ends with the very digest of one that nobody disturbed; a run with a smaller quorum goes on
without whoever is cut off, and takes them back."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from random import Random

import pytest

from nebula.cli.prepare import prepare, resolve
from nebula.cli.rundir import RunDir
from nebula.metrics.events import read
from nebula.types import COORDINATOR
from tests.e2e import netns, tmpfs
from tests.e2e.processes import POLL_SECONDS, RANK, NebulaProcess, Start, Watch, paused, summary

NORTH, SOUTH = "north", "south"
PORT = 7443


def assert_nothing_was_lost(run_dir: Path, reference: dict) -> None:
    told, events = summary(run_dir), list(read(run_dir / "events.jsonl"))
    assert (told["state"], told["rounds"]) == ("completed", 6)
    assert told["global_digest"] == reference["global_digest"]
    assert (told["loss"], told["eval_loss"]) == (reference["loss"], reference["eval_loss"])
    assert [e for e in events if e["event"] == "alarm"] == []


# --- kills and pauses ---------------------------------------------------------------------------------------------

PROCESSES = {COORDINATOR: "main coordinator", NORTH: "main agent north", SOUTH: "main agent south", "rank": RANK}


@dataclass(frozen=True)
class Fault:
    """Once `cluster` is in `phase` of `round`, these processes are killed or stand still."""

    round: int
    cluster: str
    phase: str
    victims: tuple[str, ...]
    kill: bool


def punishments(seed: int) -> list[Fault]:
    """Every process is killed once, several at a time, and some are paused, in an order and at moments by `seed`."""
    rng = Random(seed)
    kills = [["rank"], [NORTH]]  # apart: the one takes the other along
    for victim in (COORDINATOR, SOUTH):
        rng.choice(kills).append(victim)
    faults = [(tuple(victims), True) for victims in kills]
    faults += [((victim,), False) for victim in rng.sample(list(PROCESSES), 3)]
    rng.shuffle(faults)
    return [
        Fault(round, rng.choice([NORTH, SOUTH]), rng.choice(["training", "pushing"]) if kill else "training", who, kill)
        for round, (who, kill) in enumerate(faults, start=1)
    ]


def test_kills_and_pauses_of_any_process_cost_nothing_but_time(start, job, tmp_path, reference):
    nebula = start("run", job[0], "--clusters", job[1], "--engine", "local")
    nebula.wait_for("run ")
    watch = Watch(tmp_path / "runs" / "tiny", nebula)
    for fault in punishments(seed=3):
        watch.until(fault.cluster, phase=fault.phase, round=fault.round)
        punish(nebula, watch, fault)
    code, _ = nebula.finish()
    assert code == 0, nebula.said
    assert_nothing_was_lost(tmp_path / "runs" / "tiny", reference)
    clusters = summary(tmp_path / "runs" / "tiny")["clusters"]
    assert min(cluster["rejoins"] for cluster in clusters.values()) >= 1


def punish(nebula: NebulaProcess, watch: Watch, fault: Fault) -> None:
    victims = [nebula.find(PROCESSES[victim])[-1] for victim in fault.victims]
    if fault.kill:
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        return
    (victim,) = fault.victims
    unhurt = {COORDINATOR: fault.cluster, SOUTH: NORTH}.get(victim, SOUTH)
    with paused(*victims):
        watch.until(unhurt, phase="pushing", round=fault.round)


# --- networks and clocks ------------------------------------------------------------------------------------------


@pytest.fixture
def net() -> Iterator[netns.Star]:
    with netns.star(NORTH, SOUTH) as star:
        yield star


@pytest.fixture
def prepared(job, cache, tmp_path, monkeypatch):
    """What `nebula run` makes before it starts anything."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))

    def make(*overrides: str) -> RunDir:
        return prepare(*resolve(*job, overrides), tmp_path / "runs")

    return make


def shifted(**ahead: float) -> tuple[str, ...]:
    """What to put before a command whose wall clock is to be wrong by a timedelta. Monotonic time and waiting are left
    alone, unlike by libfaketime, under which Python's sleep fails."""
    (library,) = Path("/usr/lib").glob("*/datefudge/datefudge.so")
    return ("env", f"LD_PRELOAD={library}", f"DATEFUDGE={-timedelta(**ahead).total_seconds():.0f}")


@dataclass
class Sites:
    """Coordinator and agents of a run, started one by one, each in a network namespace of its own. `clock`: a command
    prefix."""

    start: Start
    run: RunDir
    net: netns.Star

    def coordinator(self, clock: Sequence[str] = ()) -> NebulaProcess:
        arguments = ("coordinator", self.run.path, "--host", "0.0.0.0", "--port", PORT)
        return self.start(*arguments, within=(*self.net.within(netns.HUB), *clock))

    def agent(self, name: str, clock: Sequence[str] = ()) -> NebulaProcess:
        arguments = {
            "--clusters": self.run.path / "federation.json",
            "--coordinator": f"{self.net.hub_as_seen_from(name)}:{PORT}",
            "--identity": self.run.identity(name),
            "--agreement": self.run.agreement().digest(),
            "--out": self.run.path,
            "--engine": "local",
        }
        flat = [word for pair in arguments.items() for word in pair]
        return self.start("agent", name, *flat, within=(*self.net.within(name), *clock))


@pytest.mark.machine("root", "ip", "nft", "datefudge")
def test_partitions_lost_packets_and_wrong_clocks_change_nothing(net, prepared, start, reference):
    sites = Sites(start, prepared(), net)
    expired, unborn = sites.coordinator(shifted(days=31)), sites.agent(NORTH, shifted(hours=-2))
    processes = [sites.coordinator(shifted(hours=2)), sites.agent(NORTH), sites.agent(SOUTH, shifted(minutes=-30))]
    watch = Watch(sites.run.path, *processes)
    net.lose(NORTH, up=0.05, down=0.05)
    watch.until(SOUTH, phase="pushing", round=1)
    for up, down in ((0, 1), (1, 1), (1, 0)):  # the answers, all, the questions
        net.lose(SOUTH, up=up, down=down)
        watch.wait(lambda: net.dropped(SOUTH) >= 3, f"{up, down} is felt")
    net.lose(SOUTH, up=0.05, down=0.05)
    assert [nebula.finish()[0] for nebula in processes] == [0, 0, 0]
    assert net.dropped(NORTH) > 0
    assert_nothing_was_lost(sites.run.path, reference)
    assert expired.finish()[0] == unborn.finish()[0] == 5
    assert "expired" in expired.said[0]
    assert "not valid before" in unborn.said[0]


@pytest.mark.machine("root", "ip", "nft")
def test_a_quorum_goes_on_without_who_is_cut_off_or_stands_still_and_takes_them_back(net, prepared, start):
    sites = Sites(start, prepared("membership.quorum=1", "rounds=100000", "evaluate_every=100000"), net)
    processes = hub, _, south = [sites.coordinator(), sites.agent(NORTH), sites.agent(SOUTH)]
    watch = Watch(sites.run.path, *processes)
    for fault in (cut(net, SOUTH), paused(south.process.pid)):
        watch.until(COORDINATOR, event="commit", contributors=[NORTH, SOUTH])
        with fault:
            assert_north_alone(watch, sites.run)
    watch.until(COORDINATOR, event="commit", contributors=[NORTH, SOUTH])
    hub.interrupt()
    assert [nebula.finish()[0] for nebula in processes] == [0, 0, 0]
    assert summary(sites.run.path)["state"] == "stopped"
    events = list(read(sites.run.events))
    assert [e for e in events if e["event"] == "alarm"] == []
    for fragment in ("f0", "f1"):
        versions = [e["version"] for e in events if e["event"] == "commit" and e["fragment"] == fragment]
        assert versions == list(range(1, len(versions) + 1))


@contextmanager
def cut(net: netns.Star, site: str) -> Iterator[None]:
    net.lose(site, up=1, down=1)
    yield
    net.lose(site)


def assert_north_alone(watch: Watch, run: RunDir) -> None:
    """What was under way when the other was cut off may still hold its deltas, later rounds may not."""
    under_way = max(e["round"] for e in read(run.events) if e["event"] == "commit") + 2
    while (commit := watch.until(COORDINATOR, event="commit"))["round"] < under_way + 3:
        assert commit["round"] <= under_way or commit["contributors"] == [NORTH]


# --- disks --------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    with tmpfs.mounted(tmp_path / "disk", megabytes=32) as folder:
        yield folder


@pytest.mark.machine("root")
def test_a_run_whose_disk_fills_up_says_so_and_goes_on_when_there_is_room(disk, start, job, reference):
    recipe, clusters = job
    run_dir = disk / "runs" / "tiny"
    nebula = start("run", recipe, "--clusters", clusters, "--engine", "local", "--out", run_dir.parent)
    Watch(run_dir, nebula).until(COORDINATOR, event="commit", round=1)
    while nebula.process.poll() is None:  # what the run gives up is taken as well
        taken = tmpfs.fill(disk)
        time.sleep(POLL_SECONDS)
    code, _ = nebula.finish()
    assert code == 3
    assert "full" in "\n".join(nebula.said)
    assert "nebula resume" in "\n".join(nebula.said)
    taken.unlink()
    code, _ = (again := start("resume", run_dir, "--engine", "local")).finish()
    assert code == 0, again.said
    assert_nothing_was_lost(run_dir, reference)
