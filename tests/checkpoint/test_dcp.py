from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from ranks import Rank, Ranks
from structlog.testing import capture_logs
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from nebula import files
from nebula.checkpoint import dcp
from nebula.checkpoint.bucket import connect
from nebula.errors import PreflightError
from nebula.parallel import mesh

NOTE = {"held": {"f0": [3, "sha256:ab"]}}


def state(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(5, 3, generator=generator), "step": torch.tensor(float(seed))}


def restored(where: str) -> tuple[int, dict[str, Tensor]]:
    found = dcp.newest(where)
    assert found is not None
    tensors = {name: torch.zeros_like(value) for name, value in state(0).items()}
    dcp.load(found, tensors)
    return found.tag, tensors


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def folders(where: str) -> list[str]:
    fs, root = connect(where)
    return sorted(path.rpartition("/")[2] for path in fs.ls(root, detail=False))


def test_what_was_saved_comes_back_in_place_and_only_two_are_kept(where):
    assert dcp.newest(where) is None
    for tag in (1, 2, 10):
        dcp.save(where, tag, state(tag), NOTE)
    assert folders(where) == ["10", "2"]
    tag, tensors = restored(where)
    assert tag == 10
    assert same(tensors, state(10))
    found = dcp.newest(where)
    assert found is not None
    assert (found.path, found.world, found.note) == (f"{where}/10", 1, NOTE)


def test_saving_a_tag_again_replaces_it(where):
    for seed in (1, 2):
        dcp.save(where, 4, state(seed), NOTE)
    tag, tensors = restored(where)
    assert tag == 4
    assert same(tensors, state(2))


def data_of(fs: AbstractFileSystem, path: str) -> tuple[str, bytes]:
    (name,) = fs.glob(f"{path}/*.distcp")
    return name, fs.cat_file(name)


def truncate(fs: AbstractFileSystem, path: str) -> str:
    name, data = data_of(fs, path)
    fs.pipe_file(name, data[:-1])
    return f"{len(data) - 1} bytes, not {len(data)}"


def flip(fs: AbstractFileSystem, path: str) -> str:
    name, data = data_of(fs, path)
    at = len(data) // 2
    fs.pipe_file(name, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    return "__0_0.distcp has other content"


def lose_data(fs: AbstractFileSystem, path: str) -> str:
    fs.rm_file(data_of(fs, path)[0])
    return "__0_0.distcp cannot be read"


def lose_metadata(fs: AbstractFileSystem, path: str) -> str:
    fs.rm_file(f"{path}/.metadata")
    return ".metadata cannot be read"


def lose_note(fs: AbstractFileSystem, path: str) -> str:
    fs.rm_file(f"{path}/state.json")
    return "state.json is missing"


def tear_note(fs: AbstractFileSystem, path: str) -> str:
    text = fs.cat_file(f"{path}/state.json")
    fs.pipe_file(f"{path}/state.json", text[: len(text) // 2])
    return "state.json cannot be read"


def future_note(fs: AbstractFileSystem, path: str) -> str:
    fs.pipe_file(f"{path}/state.json", json.dumps({"schema": 99}).encode())
    return "schema 99, not 1"


DAMAGES = [truncate, flip, lose_data, lose_metadata, lose_note, tear_note, future_note]


@pytest.mark.parametrize(
    ("where", "damage"),
    [*itertools.product(["folder", "memory"], DAMAGES), *itertools.product(["s3"], [flip, lose_data, lose_note])],
    indirect=["where"],
)
def test_a_damaged_checkpoint_is_passed_over_loudly(where, damage: Callable[[AbstractFileSystem, str], str]):
    dcp.save(where, 1, state(1), NOTE)
    dcp.save(where, 2, state(2), NOTE)
    fs, root = connect(where)
    fault = damage(fs, f"{root}/2")
    before = fs.find(root, detail=True)
    with capture_logs() as logs:
        tag, tensors = restored(where)
    assert tag == 1
    assert same(tensors, state(1))
    assert [(entry["log_level"], entry["path"]) for entry in logs] == [("warning", f"{where}/2")]
    assert fault in logs[0]["fault"]
    audited = list(dcp.audit(where))
    assert [name for name, _ in audited] == [f"{where}/2", f"{where}/1"]
    assert fault in audited[0][1]
    assert audited[1][1] == ""
    assert fs.find(root, detail=True).keys() == before.keys(), "nothing was repaired behind anyone's back"
    dcp.save(where, 2, state(3), NOTE)
    assert same(restored(where)[1], state(3))


def test_a_bad_checkpoint_of_a_later_round_never_takes_the_place_of_a_good_one(where):
    for tag in (5, 6):
        dcp.save(where, tag, state(tag), NOTE)
        fs, root = connect(where)
        flip(fs, f"{root}/{tag}")
    for tag in (1, 2):
        dcp.save(where, tag, state(tag), NOTE)
    assert folders(where) == ["1", "2"]


@pytest.mark.parametrize("victim", [(files, "write"), (LocalFileSystem, "mv")], ids=["note", "dcp"])
def test_a_save_that_fails_leaves_the_one_before(tmp_path, victim):
    where = str(tmp_path)
    dcp.save(where, 1, state(1), NOTE)
    with patch.object(*victim, _disk_full), pytest.raises(PreflightError, match="disk full"):
        dcp.save(where, 2, state(2), NOTE)
    assert restored(where)[0] == 1
    dcp.save(where, 3, state(3), NOTE)
    assert folders(where) == ["1", "3"], "the remains are swept up"


def _disk_full(*_: object, **__: object) -> None:
    raise OSError("disk full")


@contextmanager
def broken(wanted: Callable[[str, dict[str, Any]], bool]) -> Iterator[None]:
    """Requests to S3 that are `wanted` fail. They are told by operation and fields."""
    from aiobotocore.client import AioBaseClient

    call = AioBaseClient._make_api_call

    async def breaking(self: AioBaseClient, operation: str, fields: dict[str, Any]) -> Any:
        if wanted(operation, fields):
            raise RuntimeError("the link broke")
        return await call(self, operation, fields)

    with patch.object(AioBaseClient, "_make_api_call", breaking), pytest.raises(PreflightError, match="the link broke"):
        yield


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata.tmp", ".metadata", "state.json"])
def test_an_upload_that_breaks_off_leaves_the_one_before(s3, tmp_path, name):
    where = f"s3://{s3.bucket}/{tmp_path.name}"
    dcp.save(where, 1, state(1), NOTE)
    with broken(lambda operation, fields: operation[:3] in ("Put", "Cop") and fields["Key"].endswith(f"/{name}")):
        dcp.save(where, 2, state(2), NOTE)
    assert restored(where)[0] == 1
    dcp.save(where, 3, state(3), NOTE)
    assert folders(where) == ["1", "3"], "the remains are swept up"


def test_what_cannot_be_looked_at_is_not_swept_up(s3, tmp_path):
    where = f"s3://{s3.bucket}/{tmp_path.name}"
    for tag in (1, 2):
        dcp.save(where, tag, state(tag), NOTE)
    with broken(lambda _, fields: "/2/" in fields.get("Key", fields.get("Prefix", ""))):
        dcp.save(where, 3, state(3), NOTE)
    assert folders(where) == ["1", "2"]
    assert restored(where)[0] == 2


def test_a_store_that_does_not_answer_is_not_an_empty_one(s3, where):
    with pytest.raises(PreflightError, match="there is no bucket 'elsewhere'"):
        dcp.newest("s3://elsewhere/runs")
    with patch.object(dcp.Place, "tags", side_effect=ConnectionError("no answer")):
        with pytest.raises(PreflightError, match="no answer") as told:
            dcp.newest(where)
        assert told.value.hint


def test_a_checkpoint_that_cannot_be_reached_is_not_a_damaged_one(where):
    for tag in (1, 2):
        dcp.save(where, tag, state(tag), NOTE)
    for method in ("digest", "note"):
        with (
            patch.object(dcp.Place, method, side_effect=ConnectionError("no answer")),
            pytest.raises(PreflightError, match="no answer"),
        ):
            dcp.newest(where)


def sharded(rank: Rank, address: str, where: str, settings: dict[str, str], write: bool) -> Any:
    """Write 1 … 35 sharded over the ranks, or read it: this rank's part and its own tensor."""
    group = mesh.join(address, rank.memory.pop("store", None), rank.rank, rank.world, torch.device("cpu"))
    whole = torch.arange(35.0).view(7, 5) if write else torch.zeros(7, 5)
    device_mesh = init_device_mesh("cpu", (rank.world,))
    tensors = {"w": distribute_tensor(whole, device_mesh, [Shard(0)])}
    own = {f"own/{rank.rank}": torch.full((2,), float(rank.rank) if write else -1.0)}
    result: Any = whole.flatten().tolist()
    with patch.dict(os.environ, settings):
        if write:
            dcp.save(where, 5, tensors | own, NOTE)
        else:
            found = dcp.newest(where)
            assert found is not None
            dcp.load(found, tensors | own)
            value = tensors["w"]
            assert isinstance(value, DTensor)
            result = (found.world, value.full_tensor().flatten().tolist(), own[f"own/{rank.rank}"].tolist())
    group.leave()
    return result


def door(rank: Rank) -> str:
    address, rank.memory["store"] = mesh.open_store()
    return address


@pytest.mark.parametrize("where", ["folder", "s3"], indirect=True)
def test_another_number_of_ranks_reads_it(ranks: Ranks, where, s3):
    written = ranks.run(sharded, ranks.run(door, world=1)[0], where, s3.settings, True, world=3)
    read = ranks.run(sharded, ranks.run(door, world=1)[0], where, s3.settings, False, world=2)
    assert [value[:2] for value in read] == [(3, written[0])] * 2
    assert [own for _, _, own in read] == [[0.0, 0.0], [1.0, 1.0]]
    found = dcp.newest(where)
    assert found is not None
    alone = {"w": torch.zeros(7, 5)}
    dcp.load(found, alone)
    assert alone["w"].flatten().tolist() == written[0]
