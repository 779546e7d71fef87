"""What the benchmarks share: pairs and their ratios, facts of the machine, tables, result files. Imports no torch."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

from nebula.types import Json

ROOT = Path(__file__).resolve().parent.parent
NEBULA = (sys.executable, "-m", "nebula.cli.main")
TRAINER = ROOT / "trainers" / "code_moe.py"


@dataclass(frozen=True, slots=True)
class Spread:
    """Of repeated measurements: the middle one, and how far the noise carried the others."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} … {self.high:.3f})"

    def rounded(self) -> dict[str, Json]:
        return {key: round(value, 4) for key, value in asdict(self).items()}


def spread(values: Sequence[float]) -> Spread:
    return Spread(median(values), min(values), max(values))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Of each pair's ratio ours / theirs. What slows the machine down for a while slows both of a pair."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def machine() -> dict[str, Json]:
    """What a reader must know of the machine; nothing that names it."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu_model(Path("/proc/cpuinfo")),
        "cores": len(os.sched_getaffinity(0)),
        "load_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "ray", "grpcio")},
    }


def _cpu_model(cpuinfo: Path) -> str:
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table that is also aligned in a terminal: the first column left, the others right."""
    cells = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        " | ".join(text.rjust(width) if i else text.ljust(width) for i, (text, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in (cells[0], rule, *cells[1:]))
    ]
    return "\n".join(f"| {line} |" for line in lines)


def write(out: Path | None, conditions: Mapping[str, Json], settings: Mapping[str, Json], result: Json) -> None:
    """`conditions`: machine() as it was before the measurement."""
    if out is None:
        return
    content = {"schema": 1, "machine": dict(conditions), "settings": dict(settings), "result": result}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n")
