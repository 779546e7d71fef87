"""Ranks without Ray: one in this process, or several in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from nebula.errors import NebulaError, RankFailure
from nebula.runtime.engine import Group, Ranks, attempt, settle
from nebula.runtime.supervise import die_with


class InProcess:
    """A group of one rank, here. It cannot die without us."""

    def __init__(self, ranks: Ranks) -> None:
        assert ranks.count == 1
        self._worker: Any = _raised(attempt("rank 0", 0, lambda: ranks.build(0)))

    def call(self, method: str, *args: Any) -> list[Any]:
        return [self.call_first(method, *args)]

    def call_first(self, method: str, *args: Any) -> Any:
        return _raised(attempt("rank 0", 0, lambda: getattr(self._worker, method)(*args)))

    def references(self, method: str, *args: Any) -> Sequence[Any]:
        return self.call(method, *args)

    def kill(self) -> None:
        self._worker = None


class Processes:
    """A group of spawned processes, one per rank, each at the end of a pipe."""

    def __init__(self, ranks: Ranks) -> None:
        # "spawn": a forked child would share this process's threads and locks, half of them.
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        for rank in range(ranks.count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, ranks, rank, os.getpid()), daemon=True)
            process.start()
            there.close()  # so that its death closes the pipe
            self._pipes.append(here)
            self._processes.append(process)
        self._gather(range(ranks.count))

    def call(self, method: str, *args: Any) -> list[Any]:
        return self._ask(range(len(self._pipes)), method, args)

    def call_first(self, method: str, *args: Any) -> Any:
        return self._ask(range(1), method, args)[0]

    def references(self, method: str, *args: Any) -> Sequence[Any]:
        return self.call(method, *args)

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()

    def pids(self) -> list[int]:
        return [process.pid or 0 for process in self._processes]

    def _ask(self, who: Sequence[int], method: str, args: tuple[Any, ...]) -> list[Any]:
        for rank in who:
            try:
                self._pipes[rank].send((method, args))
            except OSError:
                self.kill()
                raise self._dead(rank) from None
        return self._gather(who)

    def _gather(self, who: Sequence[int]) -> list[Any]:
        waiting = {self._pipes[rank]: rank for rank in who}
        values: dict[int, Any] = {}

        def outcome(timeout: float | None) -> tuple[int, NebulaError | None] | None:
            ready = wait([*waiting, *(process.sentinel for process in self._processes)], timeout)
            for rank, process in enumerate(self._processes):
                answered = self._pipes[rank] not in waiting
                if process.sentinel in ready and (answered or not self._pipes[rank].poll()):
                    raise self._dead(rank)
            for pipe in ready:
                if isinstance(pipe, Connection):
                    rank = waiting[pipe]
                    try:
                        error, values[rank] = pipe.recv()
                    except (EOFError, OSError):
                        raise self._dead(rank) from None
                    del waiting[pipe]
                    return rank, error
            return None

        try:
            settle(len(waiting), outcome)
        except NebulaError:
            self.kill()
            raise
        return [values[rank] for rank in who]

    def _dead(self, rank: int) -> RankFailure:
        self._processes[rank].join()
        return RankFailure(rank, f"rank {rank} died with exit code {self._processes[rank].exitcode}")


def launch(ranks: Ranks) -> Group:
    """Start a group on this machine. Raises what a rank's constructor raises."""
    return InProcess(ranks) if ranks.count == 1 else Processes(ranks)


def _serve(pipe: Connection, ranks: Ranks, rank: int, parent: int) -> None:
    """A rank's process: build the worker, then answer until the pipe closes."""
    die_with(parent)
    os.environ["OMP_NUM_THREADS"] = str(ranks.threads)  # read when torch is imported, that is in `build`
    who = f"rank {rank}"
    error, worker = attempt(who, rank, lambda: ranks.build(rank))
    pipe.send((error, None))
    while True:
        try:
            method, args = pipe.recv()
        except (EOFError, OSError):
            return
        pipe.send(attempt(who, rank, lambda: getattr(worker, method)(*args)))  # noqa: B023  # called at once


def _raised(outcome: tuple[NebulaError | None, Any]) -> Any:
    error, value = outcome
    if error is not None:
        raise error
    return value
