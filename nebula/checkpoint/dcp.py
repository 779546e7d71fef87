"""A cluster's state through torch.distributed.checkpoint: written by one layout, read by any other.

    <where>/<tag>/                 the number of the round that comes next
        .metadata, *.distcp        DCP's own files, one per rank
        state.json                 what the checkpoint is, and the size and SHA-256 of every other file

`where` is a folder that every rank of the cluster sees, or an fsspec URL such as s3://bucket/path. state.json is
written last, so a checkpoint appears whole or not at all; one that was damaged later is recognised before anything is
read from it. Whoever may write there is trusted like a rank: DCP's metadata is a pickle.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import structlog
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from nebula.checkpoint.place import NOTE, Digest, Place
from nebula.checkpoint.streams import Reader, Writer
from nebula.errors import PreflightError
from nebula.types import Json

KEEP = 2
SCHEMA = 1
HINT = "check that there is room, and that every rank of the cluster reaches this place and may write to it"

T = TypeVar("T")
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint found intact. `world`: how many ranks wrote it; `note`: what the writer said of it."""

    place: Place
    tag: int
    world: int
    note: Mapping[str, Any]

    @property
    def path(self) -> str:
        return self.place.name(self.tag)


def save(where: str | Path, tag: int, state: Mapping[str, Tensor], note: Mapping[str, Json]) -> None:
    """Write `state` (DTensors and plain tensors by name) and `note` as checkpoint `tag`, then drop all but the newest
    two. Every rank calls it; it returns on all of them once the checkpoint is durable. Raises PreflightError if the
    disk or the object store refuses; the checkpoints before this one are then still there."""
    place = Place(where)
    _shared(lambda: place.begin(tag))
    writer = Writer(place, tag)
    _run_dcp(f"{place.name(tag)} cannot be written", lambda: state_dict_saver.save(dict(state), storage_writer=writer))
    written = {name: digest for part in _gathered(lambda: writer.written) for name, digest in part.items()}
    record = {"schema": SCHEMA, "tag": tag, "world": _world(), "note": note, "files": written}
    _shared(lambda: place.commit(tag, json.dumps(record, indent=1).encode(), keep=KEEP))


def newest(where: str | Path) -> Checkpoint | None:
    """The newest intact checkpoint. A damaged one is passed over with a warning that names it and what is wrong.
    Every rank calls it. Raises PreflightError if it cannot be told what is there."""
    place = Place(where)
    for tag in _shared(place.tags):
        found = _examined(place, tag)
        if isinstance(found, Checkpoint):
            return found
        log.warning("checkpoint.damaged", path=place.name(tag), fault=found, action="trying the one before it")
    return None


def audit(where: str | Path) -> Iterator[tuple[str, str]]:
    """Every checkpoint, newest first: its name, and what is wrong with it, if anything is. Changes nothing. Raises
    UsageError, PreflightError."""
    place = Place(where)
    for tag in _shared(place.tags):
        found = _examined(place, tag)
        yield place.name(tag), found if isinstance(found, str) else ""


def load(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> None:
    """Fill the tensors of `state` in place; each takes its own part, whatever layout wrote the checkpoint."""
    reader = Reader(checkpoint.place, checkpoint.tag)
    _run_dcp(f"{checkpoint.path} cannot be read", lambda: state_dict_loader.load(dict(state), storage_reader=reader))


# --- checking -------------------------------------------------------------------------------------------------------


def _examined(place: Place, tag: int) -> Checkpoint | str:
    """The checkpoint, or what is wrong with it. The ranks share the work."""
    record = _shared(lambda: _record(place, tag))
    if isinstance(record, str):
        return record
    wanted: Mapping[str, Digest] = record["files"]
    mine = sorted(wanted)[_rank() :: _world()]
    parts = _gathered(lambda: {name: place.digest(tag, name) for name in mine})
    faults = [_fault(name, wanted[name], found) for part in parts for name, found in part.items()]
    return "; ".join(filter(None, faults)) or Checkpoint(place, tag, int(record["world"]), record["note"])


def _record(place: Place, tag: int) -> dict[str, Any] | str:
    """The content of state.json, or what is wrong with it."""
    try:
        record: dict[str, Any] = json.loads(place.note(tag))
        return record if record["schema"] == SCHEMA else f"{NOTE} has schema {record['schema']}, not {SCHEMA}"
    except ConnectionError:  # says nothing about the checkpoint
        raise
    except FileNotFoundError:
        return f"{NOTE} is missing: writing it was not finished"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{NOTE} cannot be read: {error}"


def _fault(name: str, wanted: Digest, found: Digest) -> str:
    if found[0] == -1:
        return f"{name} cannot be read: {found[1]}"
    if found[0] != wanted[0]:
        return f"{name} has {found[0]} bytes, not {wanted[0]}"
    return "" if found == wanted else f"{name} has other content than was written"


# --- ranks ----------------------------------------------------------------------------------------------------------


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _gathered(act: Callable[[], T]) -> list[T]:
    """What `act` gives on every rank, in rank order. Raises PreflightError on all of them if one met an OSError."""
    try:
        mine: tuple[Any, str] = act(), ""
    except OSError as error:
        mine = None, str(error)
    every: list[Any] = [mine]
    if dist.is_initialized():
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, mine)
    if faults := [f"rank {rank}: {fault}" for rank, (_, fault) in enumerate(every) if fault]:
        raise PreflightError(f"checkpoint: {'; '.join(faults)}", hint=HINT)
    return [value for value, _ in every]


def _shared(act: Callable[[], T]) -> T:
    """What `act` gives on rank 0, on every rank. Raises as `_gathered`."""
    return _gathered(lambda: act() if _rank() == 0 else None)[0]  # type: ignore[return-value]


def _run_dcp(what: str, act: Callable[[], object]) -> None:
    with warnings.catch_warnings():
        # DCP warns when there is no process group; a cluster of one has none on purpose.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        try:
            act()
        except CheckpointException as error:  # not an Exception: nobody above would expect it
            faults = "; ".join(f"rank {rank}: {fault[0]}" for rank, fault in error.failures.items())
            raise PreflightError(f"checkpoint {what}: {faults}", hint=HINT) from error
