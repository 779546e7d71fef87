"""How much memory a piece of code may take, measured from outside, so that torch and zstandard are counted too."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RESERVE = 4 << 30
"""Address space that may be asked for. What is never touched counts here only."""


@contextmanager
def flat(limit: int) -> Iterator[None]:
    """The resident set may peak at most `limit` bytes above where it was: AssertionError. Who asks for absurd amounts
    gets MemoryError, though on this machine they might be had."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (before["VmSize"] + RESERVE, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    grown = status()["VmHWM"] - before["VmRSS"]
    assert grown < limit, f"{grown} bytes were needed, {limit} are allowed"


def status() -> dict[str, int]:
    """Sizes of this process, bytes."""
    found = re.findall(r"^(Vm\w+):\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return {name: int(size) * 1024 for name, size in found}
