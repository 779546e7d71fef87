"""Fuzz the reading of packets, guided by coverage: `make fuzz TIME=60`, which has compiled loops check their bounds.

An input that fails is kept in tests/attacks/crashes, and `test_fuzz.py` replays it from then on.
"""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(include=["nebula"], exclude=["nebula.wan.codec.kernels"]):
    import nebula.wan.frame  # noqa: F401 (what is imported first here is instrumented)

import torch
from mutate import mutant, seeds
from target import one_input

KEPT = Path(__file__).parent / "crashes"
LONGEST = 1 << 16
"""Bytes of an input: ten times the longest seed."""


def main(folder: Path, seconds: int) -> None:
    """Grow the corpus in `folder`."""
    torch.set_num_threads(1)
    start = seeds()
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(start):
        (folder / f"seed-{number:02}").write_bytes(data)
        one_input(data)  # compiles what it needs, before memory is limited

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        made = mutant(data, Random(seed), lambda raw: atheris.Mutate(raw, len(raw) + 16), start)
        return made if len(made) <= max_size else data

    # No limit on what all inputs take together: the target measures each, and atheris leaks some of what it mutates.
    options = [f"-max_total_time={seconds}", f"-max_len={LONGEST}", "-timeout=20", "-rss_limit_mb=0"]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={KEPT}/", str(folder)], one_input, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
