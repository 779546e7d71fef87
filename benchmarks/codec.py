"""Bits against error, and speed: Nebula's codecs beside the formats of others, in one run.

    python benchmarks/codec.py [--elements 1048576] [--timed 16777216] [--turns 5] [--deltas runs/deltas]
                               [--out benchmarks/results/codec.json]

First table: bits per parameter against NMSE (the error's energy over the delta's) on a Gaussian and a Laplace source
and on real deltas, which deltas.py records if they are not there yet. Nebula's bits count packet headers, trails,
sealed frames and their tags (nebula/wan/codec/measure.py); of the others' formats (rivals.py, packed to the bit) only
what they code is counted, not how it is framed; libraries that can be imported (libraries.txt) are called themselves.
Gap: bits beyond Shannon's bound for a Gaussian source, for Laplace beyond Shannon's lower bound, which no codec
attains. Support: the bits that say which values are kept, over the entropy of that. Metadata: all that is neither
values nor support. Deltas are one cluster's of consecutive rounds, each whole; figures are medians over rounds.

Second table: one thread, a Gaussian matrix of 16 million parameters, turns interleaved and rotating; torch.clone of the
same matrix is timed just before each, and "of clone" is the ratio of that pair: 0.5 is half as fast as copying.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from deltas import CLUSTERS, FOLDER, load
from libraries import SLOW, present
from measure import ROOT, Spread, machine, ratios, spread, table, write
from rivals import FORMATS, PerTensor

from nebula.types import Json
from nebula.wan.codec import measure
from nebula.wan.codec.measure import LAPLACE_DEFICIT, WIDTH, Coder, Quality, Speed, Tensors

FEW = 64 * WIDTH
"""Elements for what is too slow for more."""

QUALITY_HEAD = (
    "format: bits, NMSE, gap",
    "Gaussian",
    "NMSE",
    "gap",
    "Laplace",
    "NMSE",
    "gap ≥",
    "deltas",
    "NMSE",
    "support / entropy",
    "metadata",
    "of deltas",
)

SPEED_HEAD = ("one thread", "encode, M/s: median (min … max)", "of clone", "decode, M/s", "of clone")


def sides() -> tuple[dict[str, Coder], dict[str, str]]:
    """Ours, theirs as we wrote them, theirs as they are; and notes on the last."""
    ours = {f"nebula: {name}": measure.Wire(cfg) for name, cfg in measure.CODECS.items()}
    libraries, notes = present()
    return {**ours, **{name: PerTensor(form) for name, form in FORMATS.items()}, **libraries}, notes


def real(folder: Path) -> list[Tensors]:
    """One cluster's deltas, round by round."""
    if not load(folder):
        subprocess.run([sys.executable, ROOT / "benchmarks" / "deltas.py", "--out", folder], check=True)
    return [found[CLUSTERS[0]] for found in load(folder)]


def qualities(coder: Coder, sources: Mapping[str, Sequence[Tensors]]) -> dict[str, list[Quality]]:
    with measure.one_thread():  # on a busy machine, two of them mostly wait for each other
        return {source: [measure.quality(coder, tensors) for tensors in every] for source, every in sources.items()}


def figures(found: Mapping[str, Sequence[Quality]]) -> dict[str, dict[str, float]]:
    """By source; medians."""
    gaps = {"gaussian": 0.0, "laplace": LAPLACE_DEFICIT}
    result: dict[str, dict[str, float]] = {}
    for source, every in found.items():
        numbers = {key: median(getattr(q, key) for q in every) for key in ("bits", "nmse", "metadata")}
        if source in gaps:
            numbers["gap"] = median(q.gap(gaps[source]) for q in every)
        if (supports := [q.support for q in every if q.support is not None]) and len(supports) == len(every):
            numbers["support_over_entropy"] = median(supports)
        result[source] = numbers
    return result


def quality_row(name: str, found: Mapping[str, Mapping[str, float]]) -> list[str]:
    def cells(source: str, *forms: tuple[str, str]) -> list[str]:
        return [format(found[source][key], form) if key in found.get(source, {}) else "" for key, form in forms]

    each = (("bits", ".3f"), ("nmse", ".2e"))
    return [
        name,
        *cells("gaussian", *each, ("gap", ".2f")),
        *cells("laplace", *each, ("gap", ".2f")),
        *cells("deltas", *each),
        *cells("gaussian", ("support_over_entropy", ".3f"), ("metadata", ".2%")),
        *cells("deltas", ("metadata", ".2%")),
    ]


def speed_figures(speed: Speed, count: int) -> dict[str, Spread]:
    """Million parameters per second, and that over what clone does."""
    return {
        f"{way}_{what}": values
        for way, seconds in (("encode", speed.encode), ("decode", speed.decode))
        for what, values in (
            ("m_per_second", spread([count / s / 1e6 for s in seconds])),
            ("of_clone", ratios(speed.clone, seconds)),
        )
    }


def speed_row(name: str, found: Mapping[str, Spread]) -> list[str]:
    forms = {key: ".0f" if key.endswith("per_second") else ".2f" for key in found}
    return [name, *(f"{s.median:{forms[k]}} ({s.low:{forms[k]}} … {s.high:{forms[k]}})" for k, s in found.items())]


def main(
    elements: Annotated[int, typer.Option(help="Of each made-up source.")] = 1 << 20,
    timed: Annotated[int, typer.Option(help="Elements that are timed.")] = 1 << 24,
    turns: Annotated[int, typer.Option(help="That count.")] = 5,
    deltas: Annotated[Path, typer.Option(help="What deltas.py wrote, or shall write.")] = FOLDER,
    out: Annotated[Path | None, typer.Option(help="Where to write the result as JSON.")] = None,
) -> None:
    conditions = machine()
    coders, notes = sides()
    sources = {
        "gaussian": [measure.gaussian(elements)],
        "laplace": [measure.laplace(elements)],
        "deltas": real(deltas),
    }
    few = {"gaussian": [measure.gaussian(FEW)], "laplace": [measure.laplace(FEW)]}
    slow = {name for name in coders if name.startswith(SLOW)}
    found = {name: figures(qualities(coder, few if name in slow else sources)) for name, coder in coders.items()}
    print(table(QUALITY_HEAD, [quality_row(name, values) for name, values in found.items()]) + "\n", flush=True)
    quick = {name: coder for name, coder in coders.items() if name not in slow}
    tensors = measure.gaussian(timed)
    taken = measure.speeds(quick, tensors, turns)
    speeds = {name: speed_figures(speed, sum(x.numel() for x in tensors.values())) for name, speed in taken.items()}
    print(table(SPEED_HEAD, [speed_row(name, values) for name, values in speeds.items()]))
    print("\n" + "\n".join(f"{name}: {note}" for name, note in notes.items()))
    settings: dict[str, Json] = {"elements": elements, "timed": timed, "turns": turns, "rounds": len(sources["deltas"])}
    rounded = {name: {key: value.rounded() for key, value in values.items()} for name, values in speeds.items()}
    write(out, conditions, {**settings, "libraries": notes}, {"quality": found, "speed": rounded})


if __name__ == "__main__":
    typer.run(main)
