"""A run while it runs: a live table on a terminal, one plain line per notable event anywhere else.

`View`, `render_line`, `render_table` and `closing` are pure; `Display` owns the terminal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nebula.metrics import units
from nebula.metrics.events import Event
from nebula.metrics.history import History, Share
from nebula.types import COORDINATOR

REFRESH_SECONDS = 0.25
MAX_TEXT = 200
IN_TABLE = {"round", "eval", "run_started"}
"""Events that the live table shows by itself, so that no line above it is needed."""


@dataclass(slots=True)
class ClusterView:
    phase: str = "starting"
    round: int = 0
    step: int = 0
    steps: int = 0
    loss: float | None = None
    tokens_per_s: float | None = None


@dataclass(slots=True)
class View:
    """Everything the display shows. `rounds`: how many the run has."""

    rounds: int
    history: History = field(default_factory=History)
    clusters: dict[str, ClusterView] = field(default_factory=dict)
    last: float = 0.0

    def fold(self, source: str, event: Event) -> None:
        """Take in one event of `source`, "coordinator" or a cluster's name."""
        if source != COORDINATOR:
            return self._cluster(self.clusters.setdefault(source, ClusterView()), event)
        self.last = event["t"]
        self.history.fold(event)
        if event["event"] == "run_started":
            for name in event["clusters"]:
                self.clusters.setdefault(name, ClusterView())
        if event["event"] == "left" and event["cluster"] in self.clusters:
            self.clusters[event["cluster"]].phase = "gone"

    def _cluster(self, cluster: ClusterView, event: Event) -> None:
        cluster.round = event.get("round", cluster.round)
        match event["event"]:
            case "phase":
                cluster.phase = event["phase"]
                if cluster.phase == "training":
                    cluster.step = 0
            case "step":
                cluster.step, cluster.steps = event["step"], event["steps"]
                cluster.loss, cluster.tokens_per_s = event["loss"], event["tokens_per_s"]
            case "rank_failure":
                cluster.phase = "rebuilding"

    def elapsed(self, now: float) -> float:
        return self.history.seconds + (max(now - self.last, 0.0) if self.last else 0.0)

    def remaining(self) -> float | None:
        """Seconds until the last round at the pace so far; None before the first."""
        done = len(self.history.rounds)
        return self.history.seconds / done * max(self.rounds - done, 0) if done else None

    @property
    def finished(self) -> bool:
        return len(self.history.rounds) >= self.rounds


# --- lines --------------------------------------------------------------------------------------------------------


def render_line(view: View, source: str, event: Event) -> str | None:
    """One plain line about an event that `view` has taken in, or None if it is not worth one."""
    match event["event"]:
        case "run_started":
            size, names = units.amount(event["params"]), ", ".join(event["clusters"])
            return (
                f"{event['run']}: {size} parameters, {event['rounds']} rounds of {event['inner_steps']} steps, {names}"
            )
        case "joined":
            return f"{event['cluster']} joined" + (f" again (session {event['epoch']})" if event["epoch"] > 1 else "")
        case "left":
            return f"{event['cluster']} left; the run goes on without it"
        case "round":
            return _round_line(view, event)
        case "eval":
            unigram = units.loss(view.history.started.get("unigram_entropy"))
            return f"held-out loss {units.loss(event['loss'])} after {event['round']} rounds (unigram {unigram})"
        case "waiting":
            missing = "; ".join(f"{cluster}: {known}" for cluster, known in sorted(event["missing"].items()))
            return f"round {event['round'] + 1} waits for {_clean(missing)}"
        case "paused":
            return f"paused: {_clean(event['reason'])}"
        case "repaired":
            return f"version {event['version']} of {event['fragment']} was merged again from its deltas"
        case "late":
            return f"{event['cluster']} was too late for round {event['round'] + 1} of {event['fragment']}"
        case "rejected":
            return f"{event['cluster']}: message rejected: {_clean(event['reason'])}"
        case "alarm":
            rest = {key: value for key, value in event.items() if key not in ("t", "event", "kind")}
            return f"ALARM {source}: {event['kind']}: " + _clean(", ".join(f"{k} {v}" for k, v in rest.items()))
        case "rank_failure":
            return f"{source}: rank {event['rank']} failed, rebuilding: {_clean(event['message'])}"
        case "stopping":
            return f"stopping after this round: {_clean(event['reason'])}"
        case "run_ended":
            return f"run {event['state']}"
    return None


def _round_line(view: View, event: Event) -> str:
    shares = view.history.rounds[event["round"]].clusters.values()
    total = Share()
    for share in shares:
        total.add(share)
    parts = [
        f"round {event['round'] + 1}/{view.rounds}",
        f"loss {units.loss(event['loss'])}",
        f"{units.amount(event['tokens'])} tokens",
        f"up {units.size(total.up_bytes)}",
        f"down {units.size(total.down_bytes)}",
        f"stalled {units.share(total.stall_share)}",
    ]
    return "  ".join(parts if view.finished else [*parts, f"{units.duration(view.remaining())} left"])


def _clean(text: object) -> str:
    """One line without control characters: a peer or a traceback may have written it."""
    line = "".join(c if c.isprintable() else " " for c in str(text))
    return " ".join(line.split())[:MAX_TEXT]


# --- table --------------------------------------------------------------------------------------------------------


def render_table(view: View, now: float) -> RenderableType:
    """The live view: where the run is, then one row per cluster."""
    table = Table(box=None, padding=(0, 1), pad_edge=False, collapse_padding=True, header_style="dim")
    for name in ("cluster", "phase", "step", "", "tok/s", "loss", "up", "down", "vs fp32", "stall"):
        left = name in ("cluster", "phase", "")
        table.add_column(
            name, justify="left" if left else "right", no_wrap=True, min_width=11 if name == "phase" else 0
        )
    for name, cluster in sorted(view.clusters.items()):
        total = view.history.totals.get(name, Share())
        table.add_row(
            Text(name, "bold"),
            Text(_clean(cluster.phase), "red" if cluster.phase in ("rebuilding", "gone") else "cyan"),
            f"{cluster.step}/{cluster.steps}" if cluster.steps else units.NOTHING,
            ProgressBar(total=cluster.steps or 1, completed=cluster.step, width=8),
            units.amount(cluster.tokens_per_s),
            units.loss(cluster.loss),
            units.size(total.up_bytes),
            units.size(total.down_bytes),
            units.times(view.history.compression(name)),
            units.share(total.stall_share),
        )
    return Group(_header(view, now), table)


def _header(view: View, now: float) -> Text:
    history = view.history
    done = f"round {min(len(history.rounds) + 1, view.rounds)}/{view.rounds}"
    losses = [p.loss for p in history.evals.values()]
    unigram = units.loss(history.started.get("unigram_entropy"))
    measured = f"held-out loss {units.loss(losses[-1] if losses else None)} (unigram {unigram})"
    clock = units.duration(view.elapsed(now))
    if not view.finished:
        clock += f", {units.duration(view.remaining())} left"
    return Text.assemble((done, "bold"), "  ", measured, "  ", (clock, "dim"))


# --- the last words -----------------------------------------------------------------------------------------------


def closing(view: View, summary: Mapping[str, Any], *, run_dir: Path, sample: str = "") -> str:
    """What the run came to, and the next command. `sample`: text of the trained model, if there is one."""
    history = view.history
    losses = [p.loss for p in history.evals.values() if units.known(p.loss)]
    first, last = (losses[0], losses[-1]) if losses else (None, None)
    sent, instead = history.wan_bytes, history.data_parallel_bytes
    factor = units.times(instead / sent if sent else None)
    state, unigram = summary["state"], units.loss(history.started.get("unigram_entropy"))
    tokens, rounds = units.amount(history.tokens), len(history.rounds)
    rows = [
        (f"Run {state}", f"{rounds} of {view.rounds} rounds, {tokens} tokens in {units.duration(history.seconds)}"),
        ("Held-out loss", f"{units.loss(first)} → {units.loss(last)} (unigram entropy {unigram})"),
        (
            "Over the WAN",
            f"{units.size(sent)}, {factor} less than per-step bf16 data parallelism, {units.size(instead)}",
        ),
        ("Sample", sample.strip().replace("\n", "\n" + " " * 16)),
        ("Report", str(run_dir / "report.html")),
        ("Next", f"nebula sample {run_dir}" if state == "completed" else f"nebula resume {run_dir}"),
    ]
    return "\n".join(f"{name:<15} {text}" for name, text in rows if text)


# --- the terminal -------------------------------------------------------------------------------------------------


class Display:
    """Feed it events, tick it often, close it. It redraws at most four times a second."""

    def __init__(self, console: Console, rounds: int, clock: Callable[[], float] = time.time) -> None:
        self.view = View(rounds)
        self._console = console
        self._clock = clock
        self._drawn = 0.0
        self._live: Live | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            self._live = Live(console=console, auto_refresh=False)
            self._live.start()

    def feed(self, source: str, event: Event) -> None:
        self.view.fold(source, event)
        line = render_line(self.view, source, event)
        if line is not None and not (self._live and event["event"] in IN_TABLE):
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Something that no log tells."""
        self._console.print(_clean(text), markup=False, highlight=False, soft_wrap=True)

    def tick(self) -> None:
        now = self._clock()
        if self._live and now - self._drawn >= REFRESH_SECONDS:
            self._drawn = now
            self._live.update(render_table(self.view, now), refresh=True)

    def close(self) -> None:
        """Draw the final state and leave it on the screen."""
        if self._live:
            self._live.update(render_table(self.view, self._clock()), refresh=True)
            self._live.stop()
