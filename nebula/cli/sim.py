"""`nebula sim`: put the protocol on trial, in simulated worlds where everything goes wrong."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from nebula.cli import output
from nebula.errors import NebulaError
from nebula.metrics import units

if TYPE_CHECKING:
    from nebula.sim.world.campaign import Series, Tally, Told


def command(
    seeds: Annotated[int | None, typer.Option(min=1, help="How many runs. Default: 1000, or all crashes.")] = None,
    first: Annotated[int, typer.Option(min=0, help="Number of the first run.")] = 0,
    clusters: Annotated[int, typer.Option(min=2, max=12, help="At most; every run has a number of its own.")] = 8,
    crashes: Annotated[bool, typer.Option("--crashes", help="Instead: a power cut at each step of each disk.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes. Default: one per core.")] = None,
    trace: Annotated[int | None, typer.Option(min=0, help="Run only this number; print all that happens.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run the real coordinator and agents on a virtual clock, networks and disks that fail, and check after every event
    that nothing is lost. A number stands for one run: the same number is the same run, to the byte."""
    from nebula.sim.world.campaign import Crashes, Seeds, campaign, points, tell

    series: Series = Crashes() if crashes else Seeds(clusters)
    options = "--crashes" if crashes else f"--clusters {clusters}"
    if trace is not None:
        return report_run(tell(series, trace, whole=True), as_json=json)
    count = seeds or (len(points()) if crashes else 1000)
    with progress(count) as show:
        tally = campaign(series, range(first, first + count), jobs or os.cpu_count() or 1, show)
    report(tally, first, options, as_json=json)


@contextmanager
def progress(count: int) -> Iterator[Callable[[Tally], None]]:
    """A bar on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("runs", total=count)
        yield lambda tally: bar.update(task, completed=tally.runs)


def report_run(told: Told, *, as_json: bool) -> None:
    """One run, line by line. Raises NebulaError if it failed."""
    fields = {"run": told.number, "trace": told.trace, "digest": told.digest, "violation": violation(told)}
    if as_json:
        print(output.envelope("sim", ok=not told.violated, **fields))
    else:
        print(*told.trace, sep="\n")
    conclude(told if told.violated else None, "", as_json=as_json)


def report(tally: Tally, first: int, options: str, *, as_json: bool) -> None:
    """What was run, what was checked and what was found. Raises NebulaError if a run failed."""
    from nebula.sim.world.witness import INVARIANTS

    replay = f"nebula sim {options} --trace {tally.failed.number}" if tally.failed else ""
    fields = {
        "runs": tally.runs,
        "first": first,
        "events": tally.events,
        "virtual_hours": tally.seconds / 3600,
        "exact": tally.exact,
        "faults": dict(tally.faults),
        "invariants": INVARIANTS,
        "violation": tally.failed and violation(tally.failed),
        "replay": replay,
    }
    if as_json:
        print(output.envelope("sim", ok=tally.failed is None, **fields))
    else:
        print(output.aligned(rows(tally, first)))
    conclude(tally.failed, replay, as_json=as_json)


def rows(tally: Tally, first: int) -> Iterator[tuple[str, str]]:
    from nebula.sim.world.witness import INVARIANTS

    for key, text in INVARIANTS.items():
        yield f"checked: {key}", text
    yield "runs", f"{tally.runs} ({first} … {first + tally.runs - 1}), {tally.exact} of them with one right result"
    yield "events", f"{units.amount(tally.events)} in {tally.seconds / 3600:.1f} hours of virtual time"
    kinds = " · ".join(f"{kind} {count}" for kind, count in tally.faults.most_common())
    yield "faults", f"{tally.faults.total()}: {kinds}"
    if tally.failed is None:
        yield "violations", "none"
        return
    for line in tally.failed.trace:
        yield "trace", line


def violation(told: Told) -> dict[str, object] | None:
    if not told.violated:
        return None
    return {"run": told.number, "invariant": told.violated, "what": told.what, "trace": told.trace}


def conclude(failed: Told | None, replay: str, *, as_json: bool) -> None:
    if failed is None:
        return
    if as_json:
        raise typer.Exit(NebulaError.exit_code)
    from nebula.sim.world.witness import INVARIANTS

    told = f"run {failed.number} shows otherwise: {INVARIANTS[failed.violated]} ({failed.violated}): {failed.what}"
    raise NebulaError(told, hint=f"see all that happened: {replay}" if replay else "")
