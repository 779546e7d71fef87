"""Real deltas: the first rounds of the main job, its two clusters one after the other in this process. (1 min)

    python benchmarks/deltas.py [--rounds 4] [--out runs/deltas]

Raw fp32: nothing is quantised on either way. Each round is one safetensors file; "north/NAME" and "south/NAME" are the
clusters' deltas (base − local), "update/NAME" what the outer optimizer made of their mean and every cluster then added.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from measure import ROOT, TRAINER
from safetensors.torch import load_file, save_file
from torch import Tensor

from nebula.cli.prepare import cache_folder
from nebula.config import Agreement, Cluster, Federation, agree
from nebula.data.prepare import prepare
from nebula.federation.aggregate import WeightedMean
from nebula.federation.merge import fragment_shapes, read_delta
from nebula.federation.outer import outer_step
from nebula.parallel.export import box
from nebula.recipe import load_recipe
from nebula.runtime.engine import GroupEngine, Ranks
from nebula.runtime.local import InProcess
from nebula.types import ROLE, Delta, Slice, Steps
from nebula.wan.codec.layout import flatten
from nebula.wan.frame import pack

FOLDER = ROOT / "runs" / "deltas"
CLUSTERS = ("north", "south")
UPDATE = "update"

Round = Mapping[str, Mapping[Slice, Tensor]]
"""Tensors of each cluster and of the update."""


def load(folder: Path) -> list[Round]:
    """Consecutive rounds."""
    return [_sorted_out(load_file(file)) for file in sorted(folder.glob("round-*.safetensors"))]


def _sorted_out(tensors: Mapping[str, Tensor]) -> Round:
    found: dict[str, dict[Slice, Tensor]] = {}
    for key, x in tensors.items():
        whose, _, name = key.partition("/")
        found.setdefault(whose, {})[box(name, x)] = x
    return found


def record(folder: Path, rounds: int, overrides: list[str]) -> None:
    run = load_recipe(TRAINER, [*overrides, "wan.up.steps=[]", "wan.down.steps=[]"])
    federation = Federation(clusters=dict.fromkeys(CLUSTERS, Cluster(device="cpu", threads=1)))
    data = prepare(run.data, run.model.vocab, list(CLUSTERS), cache_folder())
    digest = "sha256:" + hashlib.sha256(data.tokenizer.encode()).hexdigest()
    agreement = agree(run, federation, tokenizer=digest, unigram_entropy=data.unigram_entropy)
    momenta: dict[str, dict[str, Tensor]] = {fragment: {} for fragment in fragment_shapes(agreement)}
    with tempfile.TemporaryDirectory() as nowhere:
        engines = {name: engine(agreement, name, data.tokenizer, nowhere) for name in CLUSTERS}
        for round in range(rounds):
            save(folder, round, one_round(agreement, engines, round, momenta))


def save(folder: Path, round: int, found: Round) -> None:
    tensors = {f"{whose}/{where.name}": x for whose, every in found.items() for where, x in every.items()}
    save_file(tensors, folder / f"round-{round:02}.safetensors")


def engine(agreement: Agreement, cluster: str, tokenizer: str, checkpoints: str) -> GroupEngine:
    settings = {
        "agreement": agreement.canonical(),
        "tokenizer": tokenizer.encode(),
        "cluster": cluster,
        "facts": Cluster(device="cpu", threads=1).model_dump_json().encode(),
        "checkpoints": f"{checkpoints}/{cluster}",
        "cache": str(cache_folder()),
    }
    started = GroupEngine(lambda: InProcess(Ranks(count=1, settings=settings)))
    started.start()
    return started


def one_round(
    agreement: Agreement, engines: Mapping[str, GroupEngine], round: int, momenta: dict[str, dict[str, Tensor]]
) -> Round:
    """Train, average, step, as the coordinator does; `momenta` by fragment are moved on."""
    run, found = agreement.run, {whose: dict[Slice, Tensor]() for whose in (*CLUSTERS, UPDATE)}
    steps, done = run.inner_steps, round * run.inner_steps
    for one in engines.values():
        one.train(Steps(round=round, position=done, first=0, count=steps, total=steps))
    for fragment, shapes in fragment_shapes(agreement).items():
        mean = WeightedMean(shapes)
        for name, one in engines.items():
            (packet,) = one.pull(fragment)
            found[name] |= (tensors := read_delta(packet, [len(packet)], shapes))
            weight = float(agreement.tokens_per_round(name))
            mean.add(
                Delta(
                    cluster=name, role=ROLE, round=round, fragment=fragment, base=round, weight=weight, tensors=tensors
                )
            )
        update, momenta[fragment] = outer_step(run.outer, mean.result(), momenta[fragment])
        pieces = {box(name, x): x for name, x in update.items()}
        found[UPDATE] |= pieces
        payload = pack(flatten(pieces, 1))
        digests = {one.push(fragment, "update", payload, merged=True) for one in engines.values()}
        assert len(digests) == 1, "the clusters hold different parameters"
    return found


def main(
    rounds: Annotated[int, typer.Option(help="How many.")] = 4,
    out: Annotated[Path, typer.Option(help="A folder of their own; replaced.")] = FOLDER,
) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    begun = time.perf_counter()
    record(out, rounds, [])
    print(f"{rounds} rounds in {time.perf_counter() - begun:.0f} s: {out}")


if __name__ == "__main__":
    typer.run(main)
