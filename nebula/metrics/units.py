"""Quantities as people read them. Every function takes None or NaN and shows an en dash for it."""

from __future__ import annotations

import math

NOTHING = "–"


def size(count: float | None) -> str:
    """Bytes in decimal units, as link rates are: 1234567 → "1.23 MB"."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB", "PB"))


def amount(count: float | None) -> str:
    """A large number: 1234567 → "1.23 M"."""
    return _scaled(count, ("", "k", "M", "G", "T", "P"))


def duration(seconds: float | None) -> str:
    """Two units at most: 3725 → "1 h 02 min"."""
    if not known(seconds):
        return NOTHING
    whole = round(seconds or 0)
    if whole < 60:
        return f"{seconds:.1f} s" if whole < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def loss(value: float | None) -> str:
    return f"{value:.3f}" if known(value) else NOTHING


def share(value: float | None) -> str:
    """0.0412 → "4 %"."""
    return f"{100 * value:.0f} %" if value is not None and known(value) else NOTHING


def times(value: float | None) -> str:
    """A ratio: 7.6 → "7.6×"."""
    return (f"{value:.1f}×" if value < 100 else f"{value:.0f}×") if value is not None and known(value) else NOTHING


def known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _scaled(count: float | None, units: tuple[str, ...]) -> str:
    if count is None or not known(count):
        return NOTHING
    power = 0
    while abs(count) >= 999.5 and power < len(units) - 1:
        count /= 1000
        power += 1
    digits = 0 if power == 0 or abs(count) >= 99.95 else 1 if abs(count) >= 9.995 else 2
    return f"{count:.{digits}f} {units[power]}".rstrip()
