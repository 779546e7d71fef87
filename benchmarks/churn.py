"""What happens to clusters while they train, kept so that every rule can be tried on the same days: churn.json.

    python benchmarks/churn.py [--run runs/code-moe]

makes the file anew. All traces but one are simulated from a seed; `how` says how each was made. "laptop" is measured:
the seconds from the opening of a round to each delta in the events of a real run (--run; without it, those that are in
the file stay), stretched so that its rounds are as long as the others'. A trace holds no decisions, only conditions, so
it can be replayed under any rule: a cluster that asks for a round at a certain time delivers when its `work` is done.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, takewhile
from operator import itemgetter
from pathlib import Path
from random import Random
from statistics import median
from typing import Annotated, Any, TypeAlias

import typer

from nebula.metrics.events import read

FILE = Path(__file__).with_name("churn.json")
CLUSTERS = ("ash", "birch", "cedar", "elm")
ROUNDS = 100
ROUND_SECONDS = 60.0
"""A cluster's median, undisturbed."""

SPAN = 3 * ROUNDS * ROUND_SECONDS
"""Seconds for which things are made to happen: enough for a rule that waits twice as long as it works."""

Interval: TypeAlias = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """One cluster's; seconds since the run began. `work`: from plan to delivery, by round. `pace`: (since, speed), 1
    where nothing is said; at 0 it stands still, though it lives. `away`: its machines are gone. `cut`: nothing crosses
    its link."""

    work: tuple[float, ...]
    pace: tuple[Interval, ...] = ()
    away: tuple[Interval, ...] = ()
    cut: tuple[Interval, ...] = ()

    def heard(self, now: float) -> bool:
        """Whether it can tell the coordinator something."""
        return _out_of(self.away, now) == now == _out_of(self.cut, now)

    def reaches(self, time: float) -> float:
        """The first moment from `time` on in which it can."""
        while (later := _out_of(self.cut, _out_of(self.away, time))) > time:
            time = later
        return time

    def speed(self, now: float) -> float:
        return next(self._speeds(now))[2]

    def worked(self, begun: float, now: float) -> float:
        """Seconds of work done between the two."""
        parts = takewhile(lambda part: part[0] < now, self._speeds(begun))
        return sum(speed * (min(until, now) - since) for since, until, speed in parts)

    def finishes(self, begun: float, work: float) -> float:
        """When so many seconds of work are done, if nothing kills it."""
        for since, until, speed in self._speeds(begun):
            if speed * (until - since) >= work:
                return since + work / speed
            work -= speed * (until - since)
        return math.inf

    def _speeds(self, begun: float) -> Iterator[tuple[float, float, float]]:
        """(since, until, speed) from `begun` on."""
        first = bisect_right(self.pace, begun, key=itemgetter(0))
        speed = self.pace[first - 1][1] if first else 1.0
        for since, until in pairwise(((begun, speed), *self.pace[first:], (math.inf, 0.0))):
            yield since[0], until[0], since[1]

    def dies(self, since: float, until: float) -> float | None:
        """If it is killed in between: when it is back."""
        return next((back for gone, back in self.away if since < gone <= until), None)

    def delivers(self, asked: float, round: int) -> float:
        """When the delta arrives that it sets out for at `asked`, however often it must begin anew, if the round stays
        open."""
        while True:
            begun = self.reaches(asked)
            done = self.reaches(self.finishes(begun, self.work[round]))
            if (back := self.dies(begun, done)) is None:
                return done
            asked = back


@dataclass(frozen=True, slots=True)
class Trace:
    how: str
    lives: Mapping[str, Life]


def _out_of(intervals: tuple[Interval, ...], time: float) -> float:
    return next((end for start, end in intervals if start <= time < end), time)


def load(file: Path = FILE) -> dict[str, Trace]:
    def life(fields: Mapping[str, Any]) -> Life:
        pairs = {key: tuple((a, b) for a, b in fields[key]) for key in ("pace", "away", "cut")}
        return Life(work=tuple(fields["work"]), **pairs)

    written = json.loads(file.read_text())
    return {
        name: Trace(trace["how"], {cluster: life(fields) for cluster, fields in trace["lives"].items()})
        for name, trace in written.items()
    }


# --- how they were made -------------------------------------------------------------------------------------------


def _working(rng: Random, *, sigma: float = 0.1, seconds: float = ROUND_SECONDS) -> Life:
    return Life(work=tuple(round(seconds * math.exp(rng.gauss(0, sigma)), 1) for _ in range(ROUNDS)))


def _now_and_then(rng: Random, every: float, least: float, most: float) -> Iterator[Interval]:
    """Exponential gaps, uniform lengths."""
    time = rng.expovariate(1 / every)
    while time < SPAN:
        length = rng.uniform(least, most)
        yield round(time, 1), round(time + length, 1)
        time += length + rng.expovariate(1 / every)


def _preempted(rng: Random, seconds: float, number: int) -> Life:
    away = _now_and_then(rng, (20, 30, 40, 60)[number] * seconds, 2 * seconds, 15 * seconds)
    return replace(_working(rng, seconds=seconds), away=tuple(away))


def _at_speed(spells: Iterator[Interval], speed: float) -> tuple[Interval, ...]:
    return tuple(change for start, end in spells for change in ((start, speed), (end, 1.0)))


def _days(rng: Random, number: int) -> tuple[Interval, ...]:
    """Speed between 1 and 0.4, a day of 40 rounds, every cluster in another time zone."""
    day = 40 * ROUND_SECONDS
    hours = range(int(SPAN / day * 24))
    return tuple((h * day / 24, round(0.7 + 0.3 * math.cos(math.tau * (h / 24 + number / 4)), 2)) for h in hours)


def _simulated(name: str, number: int, rng: Random) -> Life:
    """Of cluster `number` in a trace."""
    steady, last = _working(rng), number == len(CLUSTERS) - 1
    match name:
        case "heavy tails":
            return _working(rng, sigma=0.5)
        case "one slow":
            return _working(rng, seconds=(1 + last) * ROUND_SECONDS)
        case "preempted":
            return _preempted(rng, ROUND_SECONDS, number)
        case "short rounds":
            return _preempted(rng, ROUND_SECONDS / 6, number)
        case "flapping" if last:
            return replace(steady, cut=tuple(_now_and_then(rng, 180.0, 2.0, 40.0)))
        case "days":
            return replace(steady, pace=_days(rng, number))
        case "throttled" if last:
            return replace(steady, pace=_at_speed(_now_and_then(rng, 2400.0, 1200.0, 2400.0), 1 / 3))
        case "hanging":
            return replace(steady, pace=_at_speed(_now_and_then(rng, 3000.0, 60.0, 1200.0), 0.0))
        case "everything":
            cut = tuple(_now_and_then(rng, 600.0, 2.0, 40.0))
            worse = _preempted(rng, ROUND_SECONDS, number)
            return replace(worse, work=_working(rng, sigma=0.3).work, cut=cut, pace=_days(rng, number))
    return steady


HOW = {
    "steady": "log-normal, sigma 0.1",
    "heavy tails": "log-normal, sigma 0.5: one in 80 takes three times the median",
    "one slow": "steady, but elm takes twice as long",
    "preempted": "steady; clusters vanish every 20, 30, 40, 60 rounds of 60 s on average, for 2 to 15 rounds",
    "short rounds": "the same with rounds of 10 s",
    "flapping": "steady; elm's link is down for 2 to 40 s every 3 min on average",
    "days": "steady; all clusters' speed goes between 1 and 0.4 within 40 rounds, in four time zones",
    "throttled": "steady; for 20 to 40 min every 40 min on average, elm at once takes three times as long",
    "hanging": "steady; every 50 rounds on average a cluster stands still for 1 to 20 min, though it beats",
    "everything": "sigma 0.3, preempted, days, and every link is down for 2 to 40 s every 10 min on average",
}


def simulate() -> dict[str, Trace]:
    return {
        name: Trace(
            f"simulated: {how}",
            {cluster: _simulated(name, i, Random(f"{name} {cluster}")) for i, cluster in enumerate(CLUSTERS)},
        )
        for name, how in HOW.items()
    }


def measured(run: Path) -> Trace:
    """Of a run's folder. Its rounds are repeated until there are enough."""
    seconds: dict[str, dict[int, float]] = {}
    for event in read(run / "events.jsonl"):
        if event["event"] == "delta" and event["round"] > 0:  # the first one is about who started when
            seconds.setdefault(event["cluster"], {})[event["round"]] = event["seconds"]
    stretch = ROUND_SECONDS / median(s for rounds in seconds.values() for s in rounds.values())
    lives = {
        name: Life(work=tuple(round(stretch * of[1 + r % len(of)], 1) for r in range(ROUNDS)))
        for name, of in sorted(seconds.items())
    }
    rounds = len(next(iter(seconds.values())))
    how = (
        f"measured: {rounds} rounds of a real run of {len(lives)} clusters on one machine, {stretch:.0f} times as long"
    )
    return Trace(how, lives)


def text(traces: Mapping[str, Trace]) -> str:
    """JSON, one line per cluster."""

    def lines(trace: Trace) -> str:
        lives = (f"   {json.dumps(name)}: {json.dumps(asdict(life))}" for name, life in trace.lives.items())
        return f'{{"how": {json.dumps(trace.how)}, "lives": {{\n' + ",\n".join(lives) + "}}"

    return "{\n" + ",\n".join(f" {json.dumps(name)}: {lines(trace)}" for name, trace in traces.items()) + "}\n"


def main(run: Annotated[Path | None, typer.Option(help="A run's folder, to measure the laptop trace.")] = None) -> None:
    laptop = load()["laptop"] if run is None else measured(run)
    FILE.write_text(text({**simulate(), "laptop": laptop}))


if __name__ == "__main__":
    typer.run(main)
