"""Does anything beat scalar quantisation above one bit? E8 and trellis-coded quantisation beside the codec's own.

    python benchmarks/lattice.py [--elements 131072] [--timed 2097152] [--turns 15] [--out FILE.json]

All are compared at the same rate: ideal entropy of the symbols, coded one by one in the contexts that a decoder has
too (E8: coset, non-zeros so far, parity before the last coordinate; trellis: state), tables and levels fitted to every
other block and tried on the rest; each has its best knob. rANS is timed in the same contexts, given to it: a decoder
would have to follow states or cosets as it goes, which is not in its time. Coding contexts of the last update are not
used. "Saved": of the bits that the codec's own quantiser needs for the same error.

Measured (2 cores of a Xeon that others used, too; 131072 values of each source, timed the fastest of 15 turns on a
Gaussian one). Saved at 1 / 2 / 4 bits, in %; encode and decode of the quantiser alone, then with rANS, at 2 bits, M/s:

    E8                  Gaussian  9.1 / 5.3 / 2.7  Laplace −0.3 / 3.1 / 2.4  deltas 4.7 / 4.4 / 2.3   286 782   143 172
    trellis, 4 states   Gaussian 11.3 / 7.3 / 3.9  Laplace  2.9 / 4.8 / 3.8  deltas 6.3 / 6.2 / 3.7   283 480   142 166
    trellis, 8 states   Gaussian 13.4 / 7.7 / 4.3  Laplace  5.3 / 5.6 / 4.1  deltas 8.3 / 6.9 / 4.0   231 442   127 156
    scalar                                                                                          811 1114   213 215

A better threshold saves at most 0.4 %. Of scalar's gap to Shannon's bound at 2 bits, 0.26, E8 leaves 0.15, the trellis
0.10 and 0.09. So a trellis of four states is what could be had: always ahead of E8 and no slower to encode. Does it
pay? It does not where the codec is what one waits for: 2.3 ns more per value turn the codec's 100 M/s per core into
about 80 (computed, not tried), below the aim at 4 bits, for 4 % of the bytes. It could on a link slower than about 150
Mbit/s per core, by 6 to 7 % of a transfer at 2 bits. But there is nothing to win from less error there: in training
(results/training.json) scalar's loss at 1.65 bits is that of fp32, so that asking for less saves more. At 1 bit, where
loss is 1 % higher, 0.07 to 0.13 bits are worth about 0.1 to 0.2 % of it (by the slope from 1 to 1.65; not tried).
Against it stand a search on the GPU as well, states inside the entropy decoder, tables for each. Scalar stays.
"""

# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disallow_untyped_defs=false, disallow_untyped_decorators=false, disallow_untyped_calls=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numba
import numpy as np
import typer
from deltas import CLUSTERS, FOLDER, load
from measure import machine, table, write
from numpy.typing import NDArray

from nebula.types import Json
from nebula.wan.codec import kernels, measure, rate
from nebula.wan.codec.groups import CHUNK
from nebula.wan.codec.rans import Coder, Model, normalise

F, I = np.float32, np.int32  # noqa: E741
Array = NDArray[Any]
ONE, HALF, NONE = F(1), F(0.5), F(0)
LANES = 256
"""Trellises, or E8 points, side by side: value i of a chunk is of lane i mod LANES, so that loops are of vectors."""
CELLS = 256
"""Magnitudes of one quantiser or coset; those of the other follow in the same table of levels."""
_compiled = numba.njit(nogil=True, boundscheck=False, error_model="numpy", fastmath={"contract", "nnan", "nsz"})


@_compiled
def _shrunk(value, inverse, shrink):
    return np.copysign(min(max(abs(value * inverse) - shrink, NONE), F(CELLS - 2)), value)


@_compiled
def e8_encode(x, inverse, unit, shrink, levels, symbols, contexts):
    """The nearest to x, shrunk, of D8 (integers of even sum) and D8 + ½: an odd sum is mended where rounding was the
    closest call. A symbol is ⌊coordinate⌋; a point's first one carries the coset. x becomes what was lost."""
    found = np.empty((8, LANES), F)  # of both cosets: sum, squared distance, worst error, and where that is
    coset, mend, total, filled = np.empty((4, LANES), I)
    for start in range(0, len(x), 8 * LANES):
        found[:], total[:], filled[:] = NONE, I(0), I(0)
        for j in range(8):
            row = x[start + j * LANES : start + (j + 1) * LANES]
            for c in range(2):
                sums, far, worst, where = found[4 * c : 4 * c + 4]
                for i in range(LANES):
                    y = _shrunk(row[i], inverse, shrink)
                    f = np.floor(y + HALF - F(c) * HALF)
                    e = abs(y - f - F(c) * HALF)
                    sums[i], far[i] = sums[i] + f, far[i] + e * e
                    where[i], worst[i] = F(j) if e > worst[i] else where[i], max(worst[i], e)
        for c in range(2):
            found[4 * c] -= F(2) * np.floor(found[4 * c] * HALF)
            found[4 * c + 1] += found[4 * c] * (ONE - F(2) * found[4 * c + 2])
        for i in range(LANES):
            coset[i] = I(found[5, i] < found[1, i])
            odd, where = (found[4, i], found[7, i]) if coset[i] else (found[0, i], found[3, i])
            mend[i] = I(where if odd > NONE else -ONE)
        for j in range(8):
            span = slice(start + j * LANES, start + (j + 1) * LANES)
            row, out, context, first, last = x[span], symbols[span], contexts[span], I(j == 0), I(j == 7)
            for i in range(LANES):
                y, shift = _shrunk(row[i], inverse, shrink), F(coset[i]) * HALF
                f = np.floor(y + HALF - shift)
                z = I(f + ((ONE if y - f - shift >= NONE else -ONE) if mend[i] == I(j) else NONE))
                parity = last * (I(1) + (total[i] & I(1)))  # the last of a point has that of the others
                context[i] = (I(1) + coset[i] * I(12) + min(filled[i], I(3)) * I(3) + parity) * (I(1) - first)
                out[i] = (z << first) + first * coset[i]
                total[i] += z
                filled[i] += I((-z - coset[i] if z < 0 else z) > 0)
            for i in range(LANES):
                z = I(out[i]) >> first
                decoded = levels[coset[i] * I(CELLS) + (-z - coset[i] if z < 0 else z)] * unit
                row[i] -= -decoded if z < 0 else decoded


@_compiled
def e8_decode(symbols, unit, levels, x):
    for start in range(0, len(x), 8 * LANES):
        row, s = x[start : start + 8 * LANES], symbols[start : start + 8 * LANES]
        for i in range(LANES):
            coset = I(s[i]) & I(1)
            for j in range(8):
                z = I(s[j * LANES + i]) >> I(0 if j else 1)
                decoded = levels[coset * I(CELLS) + (-z - coset if z < 0 else z)] * unit
                row[j * LANES + i] = -decoded if z < 0 else decoded


@_compiled
def _nearest(u, odd, high, offset, zero):
    f = max(np.floor((u - (odd + odd - high)) * F(0.25) + offset), NONE)
    return F(2) * (NONE if (odd == NONE) & (u < zero) else f) + odd


@_compiled
def _cost(u, odd, high, costs):
    offset, zero, z, a, b, c = costs
    k = _nearest(u, odd, high, offset, zero)
    e = u - (k + k - high if k > NONE else NONE)
    return e * e + (a + k * (b + k * c) if k > NONE else z)


def trellis(states: int, h0: int, h1: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """Ungerboeck's code of these parity checks (reversed, less their ends). In the lower half of the states a symbol k
    stands for 2k steps, in the upper one for 2k − sign(k); its parity moves the state. `costs`, of both: where rounding
    begins, below what all is zero, then λ times bits: of zero, and a, b, c of a + bk + ck² for the others."""
    top = states // 2

    @_compiled
    def encode(x, inverse, unit, costs, levels, symbols, contexts):
        """Viterbi's algorithm forwards, then back along the best path. x becomes what was lost."""
        low, upper = costs
        spent, after = np.full(states * LANES, F(1e9)), np.empty(states * LANES, F)
        spent[:LANES], at, parities = NONE, np.empty(LANES, I), np.empty(len(x), np.uint8)
        for start in range(0, len(x), LANES):
            row, taken = x[start : start + LANES], parities[start : start + LANES]
            for i in range(LANES):
                u, bits = abs(row[i]) * inverse, 0
                even0, odd0 = _cost(u, NONE, NONE, low), _cost(u, ONE, NONE, low)
                even1, odd1 = _cost(u, NONE, ONE, upper), _cost(u, ONE, ONE, upper)
                for state in range(states):  # both before it have the same quantiser
                    high, before = state & 1, state ^ ((state & 1) * h0)
                    even = spent[(high * top + (before >> 1)) * LANES + i] + (even1 if high else even0)
                    odd = spent[(high * top + ((before ^ h1) >> 1)) * LANES + i] + (odd1 if high else odd0)
                    after[state * LANES + i] = min(even, odd)
                    bits |= int(odd < even) << state
                taken[i] = np.uint8(bits)
            spent, after = after, spent
        for i in range(LANES):
            at[i] = np.argmin(spent[i::LANES])
        for start in range(len(x) - LANES, -1, -LANES):
            span = slice(start, start + LANES)
            row, taken, out, context = x[span], parities[span], symbols[span], contexts[span]
            for i in range(LANES):
                odd, high = (I(taken[i]) >> at[i]) & I(1), at[i] & I(1)
                at[i] = (high * I(top)) | ((at[i] ^ (high * I(h0)) ^ (odd * I(h1))) >> I(1))
                k = _nearest(abs(row[i]) * inverse, F(odd), F(high), low[0], upper[1] if high else low[1])
                out[i], context[i] = np.int16(-k if row[i] < NONE else k), np.uint8(at[i])
            for i in range(LANES):
                row[i] -= np.copysign(levels[abs(I(out[i])) + I(context[i]) // I(top) * I(CELLS)] * unit, row[i])

    @_compiled
    def decode(symbols, unit, levels, x):
        at = np.zeros(LANES, I)
        for start in range(0, len(x), LANES):
            row, s = x[start : start + LANES], symbols[start : start + LANES]
            for i in range(LANES):
                k, high = I(s[i]), at[i] // I(top)
                decoded = levels[abs(k) + high * I(CELLS)] * unit
                row[i] = -decoded if k < 0 else decoded
                at[i] = ((at[i] << I(1)) & I(states - 1)) ^ (high * I(h0)) ^ ((k & I(1)) * I(h1))

    return encode, decode


def scalar(x, inverse, unit, threshold, levels, symbols, contexts):
    kernels.quantise(x, inverse, unit, ONE - threshold, levels, symbols)


@dataclass(frozen=True)
class Quantiser:
    """`knobs` to try at a rate: where the first level begins, by how much to shrink, with `states` λ in squared steps
    per bit. `magnitudes`: of a table of levels, in steps."""

    encode: Callable[..., None]
    decode: Callable[..., None]
    knobs: Callable[[float], tuple[float, ...]]
    magnitudes: Array
    states: int = 0


WHOLE = np.arange(2 * CELLS, dtype=F)
_K, _OURS = WHOLE[:CELLS], "scalar"
_UNION, _LAMBDAS = np.concatenate([2 * _K, 2 * _K - (_K > 0)]), (0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
_THRESHOLDS = (0.5, 0.53, 0.56, 0.6, 0.64, 0.68, 0.72, 0.76)
QUANTISERS: Mapping[str, Quantiser] = {
    _OURS: Quantiser(scalar, kernels.dequantise, lambda bits: (rate.threshold(bits),), WHOLE),
    "scalar, best threshold": Quantiser(scalar, kernels.dequantise, lambda bits: _THRESHOLDS, WHOLE),
    "E8": Quantiser(e8_encode, e8_decode, lambda bits: (0.0, 0.05, 0.1, 0.2, 0.3), np.concatenate([_K, _K + HALF])),
    "trellis, 4 states": Quantiser(*trellis(4, 1, 2), lambda bits: _LAMBDAS, _UNION, 4),
    "trellis, 8 states": Quantiser(*trellis(8, 5, 2), lambda bits: _LAMBDAS, _UNION, 8),
}


FORMS = (("bits", ".3f"), ("nmse", ".3e"), ("gap", ".3f"), ("saved_bits", ".3f"), ("saved", ".1%"), ("knob", ".2f"))


@dataclass(frozen=True)
class Point:
    """A quantiser at a step. `arguments` of its kernel: 1 / step, step, knob or costs, fitted levels."""

    bits: float
    nmse: float
    knob: float
    arguments: tuple[Any, ...]


def costs(knob: float, symbols: Array, upper: Array) -> Any:
    """For `trellis`, if symbols cost what they now do. Thresholds are where it does not matter which neighbour wins."""
    found = []
    for high, width in ((False, 4), (True, 3)):
        counts = np.bincount(np.abs(symbols[upper == high]), minlength=4) + 0.25
        bits, k = 1 - np.log2(counts / counts.sum()), np.arange(len(counts))  # with the sign
        c, b, a = knob * np.polyfit(k[1:], bits[1:], 2, w=np.sqrt(counts[1:]))
        z, offset = knob * (bits[0] - 1), 0.5 - max(0.0, b + 2 * c * np.average(k[1:], weights=counts[1:])) / 16
        found.append((offset, max(width / 2 + (a + 2 * b + 4 * c - z) / (2 * width), width - 4 * offset), z, a, b, c))
    return tuple(tuple(map(F, one)) for one in found)


def coded(one: Quantiser, arguments: tuple[Any, ...], x: Array) -> tuple[Array, Array]:
    symbols, contexts, lost = np.empty(len(x), np.int16), np.zeros(len(x), np.uint8), x.copy()
    for span in (slice(at, at + CHUNK) for at in range(0, len(x), CHUNK)):
        one.encode(lost[span], *arguments, symbols[span], contexts[span])
    return symbols, contexts


def point(one: Quantiser, knob: float, x: Array, step: float) -> Point:
    """Levels and tables are fitted to every other block; error and bits (ideal, in contexts) are those of the rest."""
    scale, control, cells = (F(1 / step), F(step)), F(knob), np.empty_like(x)
    if one.states:
        control = costs(0.0, np.zeros(1, np.int16), np.zeros(1, np.bool_))
        for _ in range(4):
            symbols, contexts = coded(one, (*scale, control, WHOLE), x)
            control = costs(knob, symbols, contexts >= one.states // 2)
    symbols, contexts = coded(one, (*scale, control, WHOLE), x)
    for span in (slice(at, at + CHUNK) for at in range(0, len(x), CHUNK)):
        one.decode(symbols[span], ONE, WHOLE, cells[span])
    fit, places = np.arange(len(x)) // (8 * LANES) % 2 == 0, np.minimum(np.abs(cells), 2 * CELLS - 1).astype(np.int64)
    signed = np.where(cells < 0, -x, x)
    counts, sums = (np.bincount(places[fit], weights, 2 * CELLS) for weights in (None, signed[fit]))
    levels = np.where(counts > 0, sums / np.maximum(counts, 1), one.magnitudes * step)
    lost, rest = (signed - levels[places])[~fit], x[~fit].astype(np.float64)
    tables = histogram(symbols, contexts, fit) + 0.02
    bits = -np.vdot(histogram(symbols, contexts, ~fit), np.log2(tables / tables.sum(1, keepdims=True))) / len(rest)
    return Point(float(bits), float(lost @ lost / (rest @ rest)), knob, (*scale, control, (levels / step).astype(F)))


def histogram(symbols: Array, contexts: Array, where: Any) -> Array:
    """[context, symbol], with a last column for the escape."""
    half, count = int(np.abs(symbols).max()), int(contexts.max()) + 1
    cells = contexts.astype(np.int64) * (2 * half + 2) + symbols + half
    return np.bincount(cells[where], minlength=count * (2 * half + 2)).reshape(count, -1).astype(np.float64)


def solve(at: Callable[[float], Point], bits: float, too_fine: Callable[[Point], bool]) -> Point:
    """At about the finest step that is not too fine."""
    low, high = -0.3 - bits, 4.2 - bits
    for _ in range(13):
        middle = (low + high) / 2
        low, high = (middle, high) if too_fine(at(2.0**middle)) else (low, middle)
    return at(2.0**high)


def best(name: str, x: Array, bits: float) -> tuple[Point, dict[str, float]]:
    """The knob of the least error. Saved: of the bits that the codec's own quantiser needs for the same error."""
    one, ours = QUANTISERS[name], QUANTISERS[_OURS]
    every = [solve(partial(point, one, knob, x), bits, lambda p: p.bits > bits) for knob in one.knobs(bits)]
    found = min((p for p in every if p.bits > bits - 0.01), key=lambda p: p.nmse * 4**p.bits)
    same = solve(partial(point, ours, rate.threshold(bits), x), bits, lambda p: p.nmse < found.nmse)
    needed = same.bits + 0.5 * float(np.log2(same.nmse / found.nmse))
    figures = {"bits": found.bits, "nmse": found.nmse, "gap": found.bits - measure.shannon(found.nmse)}
    return found, {**figures, "knob": found.knob, "saved_bits": needed - found.bits, "saved": 1 - found.bits / needed}


def speeds(points: Mapping[str, Point], x: Array, turns: int) -> dict[str, dict[str, float]]:
    """Million values per second and core, of the fastest turn: others work on this machine. "all_": with rANS."""
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in points}
    for _ in range(turns):
        for name, p in points.items():
            one, (symbols, contexts) = QUANTISERS[name], coded(QUANTISERS[name], p.arguments, x)
            coder, spent = Coder(Model(normalise(histogram(symbols, contexts, slice(None))), 0)), np.zeros(4)
            for span in (slice(at, at + CHUNK) for at in range(0, len(x), CHUNK)):
                lost, s, c = x[span].copy(), symbols[span], contexts[span]
                spent[0] += measure.timed(partial(one.encode, lost, *p.arguments, s, c))[0]
                seconds, sent = measure.timed(partial(coder.encode, s, c))
                back = measure.timed(partial(coder.decode, memoryview(sent), c, s))[0]
                spent[1:3] += seconds, back
                spent[3] += measure.timed(partial(one.decode, s, p.arguments[1], p.arguments[3], lost))[0]
            parts = {
                "encode": spent[0],
                "decode": spent[3],
                "all_encode": spent[:2].sum(),
                "all_decode": spent[2:].sum(),
            }
            for what, seconds in parts.items():
                taken[name].setdefault(what, []).append(seconds)
    return {name: {what: len(x) / min(t) / 1e6 for what, t in every.items()} for name, every in taken.items()}


def sources(elements: int) -> dict[str, Array]:
    """Real deltas, if deltas.py has recorded some: each matrix over its root mean square."""
    every = {"Gaussian": measure.gaussian(elements), "Laplace": measure.laplace(elements)}
    if rounds := load(FOLDER):
        every["deltas"] = {where: x for where, x in rounds[-1][CLUSTERS[0]].items() if x.numel() > LANES * LANES}
    found = {
        name: np.concatenate([x.numpy().ravel() / x.square().mean().sqrt().item() for x in some.values()])
        for name, some in every.items()
    }
    return {name: x[:: len(x) // elements][:elements].copy() for name, x in found.items()}


def main(
    elements: Annotated[int, typer.Option(help="Of each source; a multiple of 2048.")] = 1 << 17,
    timed: Annotated[int, typer.Option(help="Elements that are timed.")] = 1 << 21,
    turns: Annotated[int, typer.Option(help="The fastest of which counts.")] = 15,
    out: Annotated[Path | None, typer.Option(help="Where to write the result as JSON.")] = None,
) -> None:
    conditions, rows, points = machine(), [], {}
    result: dict[str, Json] = {}
    for source, x in sources(elements).items():
        for bits in (0.5, 1.0, 2.0, 3.0, 4.0):
            for name in QUANTISERS:
                points[source, bits, name], found = best(name, x, bits)
                result[f"{source}, {bits:g} b, {name}"] = dict(found)
                rows.append([source, name, *(format(found[key], form) for key, form in FORMS)])
    print(table(("source", "quantiser", "bits", "NMSE", "gap", "saved, b", "saved", "knob"), rows) + "\n", flush=True)
    rows, (x,) = [], (x.numpy().ravel() for x in measure.gaussian(timed).values())
    for bits in (1.0, 2.0, 4.0):
        taken = speeds({name: points["Gaussian", bits, name] for name in QUANTISERS}, x, turns)
        result[f"speed, {bits:g} b"] = {name: dict(each) for name, each in taken.items()}
        for name, each in taken.items():
            cells = (f"{value:.0f} ({value / taken[_OURS][what]:.2f})" for what, value in each.items())
            rows.append([f"{bits:g} b, {name}", *cells])
    print(table(("M/s (of scalar)", "encode", "decode", "with rANS", "decode"), rows))
    write(out, conditions, {"elements": elements, "timed": timed, "turns": turns}, result)


if __name__ == "__main__":
    typer.run(main)
