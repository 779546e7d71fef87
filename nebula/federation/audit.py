"""Is what a coordinator left behind as it was written? Asking changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

from nebula.checkpoint.ledger import Ledger
from nebula.config import Agreement
from nebula.errors import JournalError, PacketError
from nebula.federation import coordinator as machine
from nebula.federation.aggregate import Shapes
from nebula.federation.events import Committed, Event
from nebula.federation.merge import fragment_shapes
from nebula.federation.reading import read_events
from nebula.federation.restore import existing_ledger, fetched, parameters
from nebula.federation.shell import rules_of
from nebula.federation.state import Fragment, State, initial


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that was checked, what it is, and what is wrong with it, if anything is."""

    what: str
    found: str
    fault: str = ""


def audit(folder: Path, agreement: Agreement, journal: str = "", blobs: str = "") -> Iterator[Finding]:
    """The journal, and all that a coordinator would go on from: the newest two states of every fragment, whose
    parameters must have the digest that was committed, the updates before them, and the deltas.

    Arguments and errors as `restore.load_global`, but that damage is found and not raised."""
    where = journal or folder / "journal.sqlite"
    shapes = fragment_shapes(agreement)
    try:
        events = read_events(where, agreement=agreement.digest())
        state = _replayed(events, agreement, tuple(shapes))
    except JournalError as error:
        yield Finding("journal", "", error.message)
        return
    yield Finding("journal", f"{len(events)} events, up to version {max(state.round, 0)} of {agreement.run.rounds}")
    if any(fragment.chain for fragment in state.fragments.values()):
        ledger = existing_ledger(blobs or str(folder / "blobs"))
        for name, fragment in state.fragments.items():
            yield from _audited(name, fragment, shapes[name], ledger)


def _replayed(events: Sequence[Event], agreement: Agreement, fragments: tuple[str, ...]) -> State:
    state = initial(rules_of(agreement, fragments))
    try:
        return reduce(lambda state, event: machine.step(state, event, 0.0)[0], events, state)
    except LookupError as error:  # a cluster, fragment or delta that no event before told of
        raise JournalError(f"the journal's events do not follow from each other: {error!r}") from error


def _audited(name: str, fragment: Fragment, shapes: Shapes, ledger: Ledger) -> Iterator[Finding]:
    """Everything that the coordinator keeps of a fragment."""
    for commit in fragment.chain[:-2]:
        update = {kind: blob for kind, blob in commit.blobs.items() if kind == "update"}
        yield Finding(f"fragment {name}, update {commit.version}", _short(*update.values()), _damage(ledger, update))
    for commit in fragment.chain[-2:]:
        rest = {kind: blob for kind, blob in commit.blobs.items() if kind != "params"}
        faults = (_state_fault(ledger, commit, shapes), _damage(ledger, rest))
        yield Finding(f"fragment {name}, version {commit.version}", commit.digest, "; ".join(filter(None, faults)))
    merged = fragment.merged.arrivals if fragment.merged else ()
    for delta in (*merged, *fragment.arrived.values()):
        what = f"fragment {name}, delta of {delta.cluster} in round {delta.round}"
        yield Finding(what, _short(delta.blob), _damage(ledger, {"delta": delta.blob}))


def _state_fault(ledger: Ledger, commit: Committed, shapes: Shapes) -> str:
    try:
        found = {name: tuple(tensor.shape) for name, tensor in parameters(ledger, commit).items()}
    except (JournalError, PacketError) as error:
        return f"parameters: {error.message}"
    wrong = sorted(name for name in {**shapes, **found} if shapes.get(name) != found.get(name))
    return f"parameters {', '.join(wrong)} do not fit the model" if wrong else ""


def _damage(ledger: Ledger, blobs: Mapping[str, str]) -> str:
    """What is wrong with some blobs, by what they are."""
    faults = []
    for kind, blob in blobs.items():
        try:
            fetched(ledger, blob)
        except JournalError as error:
            faults.append(f"{kind}: {error.message}")
    return "; ".join(faults)


def _short(*blobs: str) -> str:
    return ", ".join(f"blob {blob[:12]}…" for blob in blobs)
