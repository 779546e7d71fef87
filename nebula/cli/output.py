"""What commands print: results on stdout, talk on stderr, and with --json one versioned envelope instead."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from typing import TextIO

from nebula.errors import NebulaError
from nebula.metrics.events import finite

SCHEMA = 1


def result(command: str, fields: Mapping[str, object], *, text: str, next: str = "", as_json: bool = False) -> None:
    """Print what a command found out. `text`: for people; `next`: the command to go on with."""
    if as_json:
        print(envelope(command, ok=True, **fields, **({"next": next} if next else {})))
        return
    print(text)
    if next:
        say(f"next: {next}")


def say(text: str) -> None:
    """Talk to whoever watches; never part of a result."""
    print(text, file=sys.stderr, flush=True)


def failure(command: str, error: NebulaError, *, as_json: bool) -> None:
    """Tell of an error: what, and what to do."""
    if as_json:
        kind = type(error).__name__
        told = {"kind": kind, "message": error.message, "hint": error.hint, "exit_code": error.exit_code}
        print(envelope(command, ok=False, error=told))
        return
    say(f"{_red('error:', sys.stderr)} {error.message}")
    if error.hint:
        say(f"hint: {error.hint}")


def envelope(command: str, *, ok: bool, **fields: object) -> str:
    """One line of JSON: `{"schema": 1, "command": …, "ok": …, …}`; a number that is not finite becomes null."""
    return json.dumps({"schema": SCHEMA, "command": command, "ok": ok, **finite(fields)}, allow_nan=False)


def aligned(rows: Iterable[tuple[str, str]]) -> str:
    """Two columns of plain text."""
    kept = list(rows)
    width = max((len(name) for name, _ in kept), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in kept)


def _red(text: str, stream: TextIO) -> str:
    """Colour on a terminal only, and not where NO_COLOR (no-color.org) asks for none."""
    return f"\x1b[1;31m{text}\x1b[0m" if stream.isatty() and not os.environ.get("NO_COLOR") else text
