"""`nebula coordinator`: owns one run's global state until the run is done or stopped."""

from __future__ import annotations

import contextlib
import json
import queue
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nebula import files
from nebula.cli import output
from nebula.cli.rundir import RunDir
from nebula.errors import QuorumError
from nebula.types import Json

if TYPE_CHECKING:
    from nebula.federation.hub import Hub
    from nebula.metrics.events import EventLog

TICK_SECONDS = 0.2


def command(
    run_dir: Annotated[Path, typer.Argument(help="The run's folder, as `nebula run` makes it.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 7443,
    journal: Annotated[str, typer.Option(help="postgresql://… ; default: SQLite in the run's folder.")] = "",
    blobs: Annotated[str, typer.Option(help="fsspec URL, such as s3://… ; default: in the run's folder.")] = "",
) -> None:
    """Run the coordinator of one run. Ctrl-C stops the run after the round that is under way, again: at once. SIGTERM
    ends only this process; agents wait `max_stall` for the next one, which may run elsewhere if journal and blobs can
    be reached from there."""
    from nebula.checkpoint.bucket import open_store
    from nebula.checkpoint.ledger import Ledger
    from nebula.federation.hub import Hub
    from nebula.federation.journal import open_journal
    from nebula.federation.service import serve
    from nebula.metrics.events import EventLog
    from nebula.security.pki import Identity

    run = RunDir(run_dir)
    agreement, tokenizer = run.agreement(), run.tokenizer()
    identity = Identity.load(run.identity("coordinator"))
    asked: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: asked.put(number))
    events = EventLog(run.events)
    hub = Hub(
        agreement,
        tokenizer.encode(),
        identity,
        open_journal(journal or run.journal / "journal.sqlite", agreement=agreement.digest()),
        Ledger(open_store(blobs or str(run.journal / "blobs"))),
        events.emit,
    )
    server, _ = serve(hub, identity, host, port)
    events.emit(
        "run_started",
        run=agreement.run.name,
        digest=agreement.digest(),
        params=hub.tally.params,
        clusters=list(agreement.members),
        rounds=agreement.run.rounds,
        inner_steps=agreement.run.inner_steps,
        fragments=agreement.run.fragments,
        unigram_entropy=agreement.unigram_entropy,
        member_tokens={name: agreement.tokens_per_round(name) for name in agreement.members},
    )
    state = "failed"
    try:
        state = _until_ended(hub, asked)
    except QuorumError:
        state = "stopped"
        raise
    finally:
        server.stop(grace=2).wait()
        summary = hub.tally.summary(run=agreement.run.name, state=state, global_digest=hub.global_digest())
        _leave(run, summary, events)
        hub.close()


def _until_ended(hub: Hub, asked: queue.SimpleQueue[int]) -> str:
    """SIGINT stops the run after the round that is under way; a second one, or SIGTERM, this process at once."""
    stopping = False
    while (state := hub.ended()) is None:
        hub.tick()
        with contextlib.suppress(queue.Empty):
            if asked.get(timeout=TICK_SECONDS) == signal.SIGTERM or stopping:
                return "stopped"
            stopping = True
            hub.stop("asked to")
    return state


def _leave(run: RunDir, summary: dict[str, Json], events: EventLog) -> None:
    """The last words. A disk too full for them is told, and must not hide why the run ended."""
    try:
        events.emit("run_ended", state=summary["state"])
        files.write(run.summary, json.dumps(summary, indent=1).encode())
    except OSError as error:
        output.say(f"{run.summary} cannot be written: {error}")
