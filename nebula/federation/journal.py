"""The coordinator's journal: every event that changed its state, in order, durable before it takes effect.

A run has one coordinator at a time. Each that opens the journal takes the next *term* first; whoever finds a later term
than its own has been replaced and may write nothing more, however alive it is and whatever its locks say.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Protocol, get_args, get_origin, get_type_hints

from nebula.errors import JournalError, PreflightError, UsageError
from nebula.federation.events import Arrived, Committed, Event, Joined, Reported

JOURNALED = (Joined, Arrived, Committed, Reported)
"""The rest of the events can happen again after a restart."""


class Journal(Protocol):
    """Several threads may use it, one at a time."""

    @property
    def term(self) -> int:
        """This coordinator's fencing number: 1 for the first that opened the journal, one more for each later one."""
        ...

    def append(self, event: Event) -> None:
        """Durable when this returns. Raises JournalError, having written nothing, if a later coordinator took over;
        whatever it raises, the caller must stop: what is in the journal is known only to who opens it next."""
        ...

    def replay(self) -> Iterator[Event]:
        """Every event, oldest first. Raises JournalError on what this Nebula cannot read."""
        ...

    def close(self) -> None: ...


def open_journal(where: str | Path, *, agreement: str) -> Journal:
    """Take over the journal at a `postgresql://…` URL or in a SQLite file, which is made if it is missing. `agreement`:
    digest of what the run agreed to.

    Raises JournalError if another coordinator holds it, it belongs to another run or cannot be trusted."""
    scheme, url, _ = str(where).partition("://")
    if not url:
        from nebula.federation.journal_sqlite import SqliteJournal

        path = Path(where)
        path.parent.mkdir(parents=True, exist_ok=True)
        return SqliteJournal(path, agreement=agreement)
    if scheme not in ("postgresql", "postgres"):
        raise UsageError(
            f"a journal cannot be kept at a {scheme}:// URL", hint="give a postgresql:// URL or the path of a file"
        )
    try:
        from nebula.federation.journal_postgres import PostgresJournal
    except ImportError as error:
        raise PreflightError(
            f"a journal in PostgreSQL needs psycopg, which does not load here: {error}",
            hint="pip install 'nebula[postgres]'",
        ) from error
    return PostgresJournal(str(where), agreement=agreement)


def in_use(where: str) -> JournalError:
    return JournalError(
        f"the journal {where} is in use by another coordinator", hint="stop that one first; a run has only one"
    )


def foreign(where: str, schema: int) -> JournalError:
    return JournalError(f"the journal {where} has schema {schema}, which this Nebula does not read")


def taken_over(where: str, term: int) -> JournalError:
    return JournalError(
        f"a later coordinator took over the journal {where}: term {term}, which was ours, is past",
        hint="nothing is lost: the later coordinator goes on from the journal; leave this one stopped",
    )


# --- events as JSON -----------------------------------------------------------------------------------------------

_KINDS: Mapping[str, type] = {kind.__name__: kind for kind in JOURNALED}


def encode(event: Event) -> tuple[str, str]:
    """(kind, body): what a journal stores of an event."""
    return type(event).__name__, json.dumps(event, default=_plain)


def _plain(value: Any) -> dict[str, object]:
    """A mapping or dataclass as what JSON knows."""
    return dict(value) if isinstance(value, Mapping) else {f.name: getattr(value, f.name) for f in fields(value)}


def decode(kind: str, body: str) -> Event:
    """The event again. Fields that an older Nebula did not know yet get their defaults.

    Raises JournalError if a newer Nebula wrote it, or it is damaged."""
    if kind not in _KINDS:
        raise JournalError(f"the journal holds an event of unknown kind {kind!r}: it was written by a newer Nebula")
    try:
        event: Event = _record(_KINDS[kind], json.loads(body))
    except (TypeError, ValueError) as error:
        raise JournalError(
            f"the journal is damaged: its {kind} event {body[:80]!r} cannot be read: {error}",
            hint="restore it from a copy",
        ) from error
    return event


_hints = cache(get_type_hints)


def _record(kind: type, body: object) -> Any:
    if not isinstance(body, dict):
        raise TypeError(f"{body!r} is not a {kind.__name__}")
    hints = _hints(kind)
    if unknown := body.keys() - hints:
        raise JournalError(
            f"the journal holds a {kind.__name__} with unknown fields ({', '.join(sorted(unknown))}): "
            f"it was written by a newer Nebula"
        )
    return kind(**{name: _value(hints[name], value) for name, value in body.items()})


def _value(hint: Any, value: Any) -> object:
    """What `hint`, the type of a field, makes of a JSON value."""
    kind, args = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return _record(hint, value)  # type: ignore[arg-type]
    if kind is UnionType:  # of something and None
        (inner,) = (arg for arg in args if arg is not NoneType)
        return None if value is None else _value(inner, value)
    if kind is tuple and args[1:] == (...,):
        return tuple(_value(args[0], item) for item in value)
    if kind is tuple:
        return tuple(_value(arg, item) for arg, item in zip(args, value, strict=True))
    if kind is Mapping and isinstance(value, dict):
        return {args[0](key): _value(args[1], item) for key, item in value.items()}
    if kind is Literal and value in args:
        return value
    if type(value) is hint or (hint is float and type(value) is int):
        return value
    raise TypeError(f"{value!r} is not {hint}")
