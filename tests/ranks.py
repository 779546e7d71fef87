"""Torch ranks for tests: processes that live as long as the session, since a cold one costs seconds.

`ranks.run(function, *arguments, world=n)` calls `function(rank, *arguments)` in n of them at once and returns the n
results, by rank. What a function leaves in `rank.memory` is there for the next one. Functions must be importable.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

SIZE = 3


@dataclass
class Rank:
    rank: int
    world: int
    memory: dict[str, Any] = field(default_factory=dict)


class Ranks:
    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["nebula.train.worker"])
        self._ranks: list[tuple[Connection, BaseProcess]] = []

    def run(self, function: Callable[..., Any], *arguments: Any, world: int) -> list[Any]:
        if not self._ranks:
            self._ranks = [self._spawn() for _ in range(SIZE)]
        pipes = [pipe for pipe, _ in self._ranks[:world]]
        for rank, pipe in enumerate(pipes):
            pipe.send((function, arguments, rank, world))
        results: dict[Connection, Any] = {}
        while len(results) < world:
            for pipe in wait([pipe for pipe in pipes if pipe not in results]):
                results[pipe], error = pipe.recv()
                if error is not None:
                    self.close()  # the other ranks may wait for this one; the next run starts afresh
                    raise error
        return [results[pipe] for pipe in pipes]

    def close(self) -> None:
        for _, process in self._ranks:
            process.kill()
            process.join()
        self._ranks = []

    def _spawn(self) -> tuple[Connection, BaseProcess]:
        here, there = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(there,), daemon=True)
        process.start()
        return here, process


def _serve(pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    memory: dict[str, Any] = {}
    while True:
        function, arguments, rank, world = pipe.recv()
        try:
            pipe.send((function(Rank(rank, world, memory), *arguments), None))
        except Exception as error:
            pipe.send((None, error))
