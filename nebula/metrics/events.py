"""`events.jsonl`: what happened, one JSON object per line, `{"t": unix seconds, "event": kind, …}`.

Lines are only ever appended. Non-finite numbers are written as null, because JSON has no NaN. A crash can tear the last
line and no other: readers leave it out, and the next writer cuts it off.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nebula.errors import UsageError

Event = dict[str, Any]


class EventLog:
    """An append-only log. Threads may share one."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(path)
        self._file = path.open("a", encoding="utf-8")
        self._clock = clock
        self._lock = threading.Lock()

    def emit(self, event: str, /, **fields: object) -> None:
        """Append one event; it is in the file (not yet on the disk) when this returns."""
        line = json.dumps({"t": round(self._clock(), 3), "event": event, **finite(fields)}, allow_nan=False)
        with self._lock:
            self._file.write(line + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("r+b") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)


def read(path: Path) -> Iterator[Event]:
    """Every event of a log, oldest first. Raises UsageError for a line that is no event, unless it is a torn last."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                yield _parse(line, f"{path}:{number}")


class Tail:
    """Reads a log that is still being written, or does not exist yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._lines = 0

    def poll(self) -> list[Event]:
        """The events since the last call. Never waits."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.splitlines()
        events = [_parse(line, f"{self._path}:{self._lines + i}") for i, line in enumerate(lines, start=1)]
        self._offset += len(whole)
        self._lines += len(lines)
        return events


def _parse(line: bytes, where: str) -> Event:
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str) or not _is_number(event.get("t")):
        raise UsageError(
            f"not an event ({where}): expected a JSON object with `t` and `event`", hint="is it a run's log?"
        )
    return event


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def finite(value: Any) -> Any:
    """The same JSON-like value with NaN and infinities as None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(item) for item in value]
    return value
