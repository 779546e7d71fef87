"""The global model of a run, read from what its coordinator left behind. Nothing there changes."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from nebula.checkpoint.bucket import open_store
from nebula.checkpoint.ledger import Ledger
from nebula.config import Agreement
from nebula.errors import UnreachableError, UsageError
from nebula.federation.events import Committed
from nebula.federation.merge import check_digest, read_state
from nebula.federation.reading import read_events
from nebula.types import Json
from nebula.wan.digest import global_digest


def load_global(
    folder: Path, agreement: Agreement, journal: str = "", blobs: str = ""
) -> tuple[dict[str, Tensor], dict[str, Json]]:
    """Parameters by name (fp32, as the newest commits left them) and {"version", "digest"}. `folder`: where journal and
    blobs are, unless their URLs are given.

    Raises UsageError if nothing was committed, PreflightError if the coordinator still runs, JournalError if the
    journal or a blob is damaged, UnreachableError."""
    events = read_events(journal or folder / "journal.sqlite", agreement=agreement.digest())
    commits = {event.fragment: event for event in events if isinstance(event, Committed)}
    if not commits:
        raise UsageError(f"{folder} holds no committed state yet", hint="`nebula resume` goes on with the run")
    ledger = existing_ledger(blobs or str(folder / "blobs"))
    params: dict[str, Tensor] = {}
    for commit in commits.values():
        params |= parameters(ledger, commit)
    info: dict[str, Json] = {
        "version": min(commit.version for commit in commits.values()),
        "digest": global_digest({name: commit.digest for name, commit in commits.items()}),
    }
    return params, info


def existing_ledger(where: str) -> Ledger:
    """Raises UsageError rather than make a folder."""
    if "://" not in where and not Path(where).is_dir():
        raise UsageError(
            f"there are no blobs in {where}",
            hint="if they are elsewhere, say so as `nebula coordinator` was told: --blobs s3://…",
        )
    return Ledger(open_store(where))


def fetched(ledger: Ledger, blob: str) -> bytes:
    """Raises JournalError if it is missing or damaged, UnreachableError."""
    try:
        return ledger.get(blob)
    except ConnectionError as error:
        raise UnreachableError(
            f"the blobs cannot be read: {error}", hint="check the URL and its credentials"
        ) from error


def parameters(ledger: Ledger, commit: Committed) -> dict[str, Tensor]:
    """A fragment's, by name, as they were committed. Raises as `fetched`, and PacketError."""
    params = read_state(fetched(ledger, commit.blobs["params"]))
    check_digest(params, commit.digest)
    return params
