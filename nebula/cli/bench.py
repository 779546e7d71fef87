"""`nebula bench`: what Nebula's parts can do on this machine. Side by side with others: benchmarks/."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from nebula.cli import output

if TYPE_CHECKING:
    from nebula.wan.codec.measure import Quality, Speed

command = typer.Typer(help="Measure what Nebula's parts can do on this machine.", add_completion=False)

TURNS = 3

HEAD = (
    ("codec", ""),
    ("Gaussian", "bits"),
    ("", "NMSE"),
    ("", "over Shannon"),
    ("Laplace", "bits"),
    ("", "NMSE"),
    ("metadata", "%"),
    ("encode", "M/s"),
    ("decode", "M/s"),
    ("encode", "× clone"),
    ("decode", "× clone"),
)


@command.callback()
def group() -> None:
    """Keeps `codec` a command of its own while it is the only one."""


@command.command("codec")
def codec(
    elements: Annotated[int, typer.Option(min=1024, help="Parameters to code.")] = 1 << 20,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Bits per parameter, error and speed of every codec, on made-up deltas. Bits count headers and tags; NMSE is the
    error's energy over the delta's; "over Shannon": bits beyond what any codec needs for that error; speed is that of
    one core, in million parameters per second and as a share of that of torch.clone."""
    from nebula.wan.codec import measure

    coders = {name: measure.Wire(cfg) for name, cfg in measure.CODECS.items()}
    tensors, heavy = measure.gaussian(elements), measure.laplace(elements)
    count = sum(x.numel() for x in tensors.values())
    speeds = measure.speeds(coders, tensors, TURNS)
    found = {
        name: figures(measure.quality(coder, tensors), measure.quality(coder, heavy), speeds[name], count)
        for name, coder in coders.items()
    }
    fields = {"elements": count, "turns": TURNS, "codecs": found}
    output.result("bench", fields, text="\n".join(lines(found)), as_json=json)


def figures(gaussian: Quality, laplace: Quality, speed: Speed, count: int) -> dict[str, float]:
    return {
        "gaussian_bits": gaussian.bits,
        "gaussian_nmse": gaussian.nmse,
        "gaussian_over_shannon": gaussian.gap(),
        "laplace_bits": laplace.bits,
        "laplace_nmse": laplace.nmse,
        "metadata_share": gaussian.metadata,
        "encode_per_second": count / median(speed.encode),
        "decode_per_second": count / median(speed.decode),
        "encode_over_clone": median(c / e for c, e in zip(speed.clone, speed.encode, strict=True)),
        "decode_over_clone": median(c / d for c, d in zip(speed.clone, speed.decode, strict=True)),
    }


def lines(found: dict[str, dict[str, float]]) -> Iterator[str]:
    """A table: the first column left, the others right."""
    rows = [[above for above, _ in HEAD], [below for _, below in HEAD]]
    rows += [[name, *shown(values)] for name, values in found.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        yield "  ".join([first.ljust(widths[0]), *cells]).rstrip()


def shown(values: dict[str, float]) -> Iterator[str]:
    for key, value in values.items():
        if key.endswith("nmse"):
            yield f"{value:.2e}"
        elif key.endswith("per_second"):
            yield f"{value / 1e6:.0f}"
        elif key.endswith("share"):
            yield f"{100 * value:.2f}"
        else:
            yield f"{value:.3f}"
