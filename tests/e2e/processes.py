"""Command lines as a user starts them: real processes, found, killed and paused by what they are, and the events that
they write, by which tests wait for a moment of a run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nebula.metrics.events import Event, Tail
from nebula.types import COORDINATOR

RANK = "multiprocessing.spawn"
POLL_SECONDS = 0.01

RECIPE = """
from nebula.config import AdamW, Data, Membership, Model, Run

def recipe() -> Run:
    return Run(
        name="tiny",
        model=Model(vocab=320, layers=2, dim=32, heads=2, kv_heads=2, ffn_dim=32, experts=4),
        data=Data(path={corpus!r}, seq_len=32, held_out=0.1, eval_windows=8),
        optimizer=AdamW(lr=3e-3, warmup=2),
        rounds=6, inner_steps=3, batch=2, evaluate_every=3,
        membership=Membership(quorum=2, max_stall=120.0),
    )
"""

CLUSTERS = """
coordinator: {port: 0}
clusters:
  north: {ranks: 2, device: cpu, link: {rate_mbps: 1000, rtt_ms: 2}}
  south: {ranks: 1, device: cpu, link: {rate_mbps: 1000, rtt_ms: 2}}
"""


def write_job(folder: Path, corpus: Path) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    recipe, clusters = folder / "tiny.py", folder / "two.yaml"
    recipe.write_text(RECIPE.replace("{corpus!r}", repr(str(corpus))))
    clusters.write_text(CLUSTERS)
    return recipe, clusters


@dataclass
class NebulaProcess:
    """One command line. Its talk is read line by line, which is how tests wait for a moment of the run. `within`: what
    to put before it; must become the process itself."""

    arguments: list[str]
    cwd: Path
    cache: Path
    within: Sequence[str] = ()
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.process = subprocess.Popen(
            [*self.within, sys.executable, "-m", "nebula.cli.main", *self.arguments],
            cwd=self.cwd,
            env={**os.environ, "XDG_CACHE_HOME": str(self.cache)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, pattern: str) -> None:
        """Until it says something like `pattern`. Fails if it ends before."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line.rstrip())
            if re.search(pattern, line):
                return
        raise AssertionError(f"it ended without saying {pattern!r}:\n" + "\n".join(self.said))

    def finish(self) -> tuple[int, str]:
        """Exit code and stdout."""
        out, err = self.process.communicate()
        self.said += err.splitlines()
        assert "Traceback" not in err, err
        return self.process.returncode, out

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def descendants(self, words: str) -> list[int]:
        """Pids of processes below this one whose command line matches `words`, oldest first."""
        return [pid for pid in below(self.process.pid) if re.search(words, command_line(pid))]

    def kill(self, words: str, which: int = 0) -> None:
        """SIGKILL to one of them."""
        os.kill(self.find(words)[which], signal.SIGKILL)

    def find(self, words: str) -> list[int]:
        """As `descendants`, of which there must be some."""
        found = self.descendants(words)
        assert found, f"nothing like {words!r} among {[command_line(p) for p in below(self.process.pid)]}"
        return found

    def end(self) -> None:
        """Whatever state it is in."""
        if self.process.poll() is None:
            for pid in (self.process.pid, *below(self.process.pid)):
                _signal(pid, signal.SIGCONT)
            self.process.terminate()
            self.process.communicate()


@contextmanager
def paused(*pids: int) -> Iterator[None]:
    """Processes that stand still for a while, and do not know it."""
    with ExitStack() as stack:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
            stack.callback(_signal, pid, signal.SIGCONT)
        yield


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it has ended
        os.kill(pid, number)


class Watch:
    """The events of a run as its processes write them. `running`: those without which none will come."""

    def __init__(self, run_dir: Path, *running: NebulaProcess) -> None:
        self._tails = {COORDINATOR: Tail(run_dir / "events.jsonl")}
        self._tails |= {name: Tail(run_dir / "clusters" / name / "events.jsonl") for name in ("north", "south")}
        self._news: dict[str, list[Event]] = {source: [] for source in self._tails}
        self._running = running

    def until(self, source: str, **fields: object) -> Event:
        """The next event of "coordinator" or a cluster with these fields, of those that no call has passed yet."""
        found: list[Event] = []

        def seen() -> bool:
            news = self._news[source]
            news += self._tails[source].poll()
            while news and not found:
                event = news.pop(0)
                if fields.items() <= event.items():
                    found.append(event)
            return bool(found)

        self.wait(seen, f"{source} tells {fields}")
        return found[0]

    def wait(self, reached: Callable[[], bool], what: str) -> None:
        """Until something is so. Fails if a process ends before."""
        while not reached():
            for nebula in self._running:
                code = nebula.process.poll()
                if code is not None and not reached():
                    nebula.finish()
                    told = "\n".join(nebula.said)
                    raise AssertionError(f"it ended with {code} before {what}: {nebula.arguments}\n{told}")
            time.sleep(POLL_SECONDS)


def below(root: int) -> list[int]:
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text(errors="replace")
            except OSError:
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found: list[int] = []
    fresh = [root]
    while fresh:
        fresh = sorted(pid for pid, parent in parents.items() if parent in fresh)
        found += fresh
    return found


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


Start = Callable[..., NebulaProcess]
