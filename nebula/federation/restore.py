"""The global model of a run, read from what its coordinator left behind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from nebula.checkpoint.ledger import Ledger
from nebula.config import Agreement
from nebula.errors import UsageError
from nebula.federation.events import Committed
from nebula.federation.journal import Journal
from nebula.federation.merge import check_digest, read_state
from nebula.types import Json
from nebula.wan.digest import global_digest


def load_global(folder: Path, agreement: Agreement) -> tuple[dict[str, Tensor], dict[str, Json]]:
    """Parameters by name (fp32, as the newest commits left them) and {"version", "digest"}. `folder`: the journal's.

    Raises UsageError if nothing was committed, JournalError if the coordinator still runs or a blob is damaged."""
    path = folder / "journal.sqlite"
    if not path.exists():
        raise UsageError(f"{folder} holds no journal: this run never had a coordinator", hint="give a run's folder")
    journal = Journal(path, agreement=agreement.digest())
    try:
        commits = {event.fragment: event for event in journal.replay() if isinstance(event, Committed)}
    finally:
        journal.close()
    if not commits:
        raise UsageError(f"{folder} holds no committed state yet", hint="`nebula resume` goes on with the run")
    return _read(Ledger(folder / "blobs"), commits)


def _read(ledger: Ledger, commits: Mapping[str, Committed]) -> tuple[dict[str, Tensor], dict[str, Json]]:
    params: dict[str, Tensor] = {}
    for commit in commits.values():
        state = read_state(ledger.get(commit.blobs["params"]))
        check_digest(state, commit.digest)
        params |= state
    info: dict[str, Json] = {
        "version": min(commit.version for commit in commits.values()),
        "digest": global_digest({name: commit.digest for name, commit in commits.items()}),
    }
    return params, info
