"""A cluster's state on its own disk, through torch.distributed.checkpoint: written by one layout, read by any other.

    <folder>/<tag>/                the number of the round that comes next
        state.json                 what the checkpoint is, and the size and SHA-256 of every other file
        .metadata, *.distcp        DCP's own files, one per rank

Every rank of the cluster must see `folder` (one disk, or a shared file system). A checkpoint appears whole or not at
all, and one that was damaged later is recognised before anything is read from it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import structlog
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter

from nebula import files
from nebula.errors import PreflightError
from nebula.types import Json

KEEP = 2
SCHEMA = 1
NOTE = "state.json"
HINT = "check that the disk is not full and that every rank of the cluster may write to this folder"

T = TypeVar("T")
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint found intact. `world`: how many ranks wrote it; `note`: what the writer said of it."""

    path: Path
    tag: int
    world: int
    note: Mapping[str, Any]


def save(folder: Path, tag: int, state: Mapping[str, Tensor], note: Mapping[str, Json]) -> None:
    """Write `state` (DTensors and plain tensors by name) and `note` as checkpoint `tag`, then drop all but the newest
    two. Every rank calls it; it returns on all of them once the checkpoint is on disk. Raises PreflightError if the
    disk refuses; the checkpoints before this one are then still there."""
    aside = folder / f".{tag}.partial"
    _on_first(lambda: _clear(folder, aside))
    _run_dcp(
        f"{aside} cannot be written", lambda: state_dict_saver.save(dict(state), storage_writer=FileSystemWriter(aside))
    )
    files = _digests(aside, _shared(lambda: sorted(path.name for path in aside.iterdir())))
    written = {"schema": SCHEMA, "tag": tag, "world": _world(), "note": note, "files": files}
    _on_first(lambda: _commit(folder, aside, tag, written))


def newest(folder: Path) -> Checkpoint | None:
    """The newest intact checkpoint. A damaged one is passed over with a warning that names it and what is wrong."""
    for tag in _shared(lambda: sorted(_tags(folder), reverse=True)):
        path = folder / str(tag)
        found = _shared(lambda path=path: _read_note(path))  # type: ignore[misc]
        if isinstance(found, str):
            fault = found
        else:
            fault = _compare(found["files"], _digests(path, sorted(found["files"])))
            if not fault:
                return Checkpoint(path, tag, int(found["world"]), found["note"])
        log.warning("checkpoint.damaged", path=str(path), fault=fault, action="trying the one before it")
    return None


def load(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> None:
    """Fill the tensors of `state` in place; each takes its own part, whatever layout wrote the checkpoint."""
    reader = FileSystemReader(checkpoint.path)
    _run_dcp(f"{checkpoint.path} cannot be read", lambda: state_dict_loader.load(dict(state), storage_reader=reader))


# --- files ----------------------------------------------------------------------------------------------------------


def _tags(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []


def _clear(folder: Path, aside: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(".*.partial"):
        shutil.rmtree(left_over)
    aside.mkdir()


def _commit(folder: Path, aside: Path, tag: int, written: Mapping[str, object]) -> None:
    files.write(aside / NOTE, json.dumps(written, indent=1).encode())
    files.sync(aside)
    target = folder / str(tag)
    if target.exists():  # the same round again, after a resume from an older one
        shutil.rmtree(target)
    aside.rename(target)
    files.sync(folder)
    for old in sorted(_tags(folder), reverse=True)[KEEP:]:
        shutil.rmtree(folder / str(old))


def _read_note(path: Path) -> dict[str, Any] | str:
    """The content of state.json, or what is wrong with it."""
    try:
        found: dict[str, Any] = json.loads((path / NOTE).read_text())
        return found if found["schema"] == SCHEMA else f"schema {found['schema']} is not {SCHEMA}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{NOTE}: {error}"


def _digests(path: Path, names: list[str]) -> dict[str, list[int | str]]:
    """Size and SHA-256 of files, shared out over the ranks; -1 where a file cannot be read."""
    mine = {name: _digest(path / name) for name in names[_rank() :: _world()]}
    return {name: value for part in _gathered(mine) for name, value in part.items()}


def _digest(path: Path) -> list[int | str]:
    try:
        with path.open("rb") as file:
            return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
    except OSError as error:
        return [-1, str(error)]


def _compare(wanted: Mapping[str, list[int | str]], found: Mapping[str, list[int | str]]) -> str:
    wrong = [f"{name} is {found[name]}, not {wanted[name]}" for name in wanted if found[name] != wanted[name]]
    return "; ".join(wrong)


# --- ranks ----------------------------------------------------------------------------------------------------------


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _gathered(value: T) -> list[T]:
    """Every rank's value, in rank order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _shared(compute: Callable[[], T]) -> T:
    """What rank 0 computes, on every rank."""
    return _gathered(compute() if _rank() == 0 else None)[0]  # type: ignore[return-value]


def _on_first(act: Callable[[], None]) -> None:
    """Let rank 0 act on the file system. Raises PreflightError on every rank if it cannot."""
    fault = _shared(lambda: _attempt(act))
    if fault:
        raise PreflightError(f"checkpoint: {fault}", hint=HINT)


def _attempt(act: Callable[[], None]) -> str:
    try:
        act()
    except OSError as error:
        return str(error)
    return ""


def _run_dcp(what: str, act: Callable[[], object]) -> None:
    with warnings.catch_warnings():
        # DCP warns when there is no process group; a cluster of one has none on purpose.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        try:
            act()
        except CheckpointException as error:  # not an Exception: nobody above would expect it
            faults = "; ".join(f"rank {rank}: {fault[0]}" for rank, fault in error.failures.items())
            raise PreflightError(f"checkpoint {what}: {faults}", hint=HINT) from error
