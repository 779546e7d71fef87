from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import Rank, Ranks
from structlog.testing import capture_logs
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from nebula.checkpoint import dcp
from nebula.errors import PreflightError
from nebula.parallel import mesh

NOTE = {"held": {"f0": [3, "sha256:ab"]}}


def state(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(5, 3, generator=generator), "step": torch.tensor(float(seed))}


def restored(folder: Path) -> tuple[int, dict[str, Tensor]]:
    found = dcp.newest(folder)
    assert found is not None
    tensors = {name: torch.zeros_like(value) for name, value in state(0).items()}
    dcp.load(found, tensors)
    return found.tag, tensors


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_what_was_saved_comes_back_in_place_and_only_two_are_kept(tmp_path: Path) -> None:
    assert dcp.newest(tmp_path / "runs") is None
    for tag in (1, 2, 10):
        dcp.save(tmp_path / "runs", tag, state(tag), NOTE)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["10", "2"]
    tag, tensors = restored(tmp_path / "runs")
    assert tag == 10
    assert same(tensors, state(10))
    found = dcp.newest(tmp_path / "runs")
    assert found is not None
    assert (found.world, found.note) == (1, NOTE)


def test_saving_a_tag_again_replaces_it(tmp_path: Path) -> None:
    for seed in (1, 2):
        dcp.save(tmp_path, 4, state(seed), NOTE)
    tag, tensors = restored(tmp_path)
    assert tag == 4
    assert same(tensors, state(2))


def truncate(path: Path) -> None:
    data = next(path.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = next(path.glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)


def lose_metadata(path: Path) -> None:
    (path / ".metadata").unlink()


def lose_note(path: Path) -> None:
    (path / dcp.NOTE).unlink()


def tear_note(path: Path) -> None:
    text = (path / dcp.NOTE).read_text()
    (path / dcp.NOTE).write_text(text[: len(text) // 2])


def future_note(path: Path) -> None:
    (path / dcp.NOTE).write_text(json.dumps({"schema": 99}))


@pytest.mark.parametrize("damage", [truncate, flip, lose_metadata, lose_note, tear_note, future_note])
def test_a_damaged_checkpoint_is_passed_over_loudly(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    dcp.save(tmp_path, 1, state(1), NOTE)
    dcp.save(tmp_path, 2, state(2), NOTE)
    damage(tmp_path / "2")
    with capture_logs() as logs:
        tag, tensors = restored(tmp_path)
    assert tag == 1
    assert same(tensors, state(1))
    assert [(entry["log_level"], entry["path"]) for entry in logs] == [("warning", str(tmp_path / "2"))]
    assert logs[0]["fault"]


@pytest.mark.parametrize("victim", [(dcp.files, "write"), (Path, "rename")], ids=["note", "dcp"])
def test_a_save_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch, victim) -> None:  # type: ignore[no-untyped-def]
    dcp.save(tmp_path, 1, state(1), NOTE)
    with monkeypatch.context() as patch:
        patch.setattr(*victim, _disk_full)
        with pytest.raises(PreflightError, match="disk full"):
            dcp.save(tmp_path, 2, state(2), NOTE)
    assert restored(tmp_path)[0] == 1
    dcp.save(tmp_path, 3, state(3), NOTE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"], "the remains are swept up"


def _disk_full(*_: object, **__: object) -> None:
    raise OSError("disk full")


def sharded(rank: Rank, address: str, folder: Path, write: bool) -> list[float] | tuple[int, list[float], list[float]]:
    """Write 1 … 35 sharded over the ranks, or read it: this rank's part and its own tensor."""
    group = mesh.join(address, rank.memory.pop("store", None), rank.rank, rank.world, torch.device("cpu"))
    whole = torch.arange(35.0).view(7, 5) if write else torch.zeros(7, 5)
    device_mesh = init_device_mesh("cpu", (rank.world,))
    tensors = {"w": distribute_tensor(whole, device_mesh, [Shard(0)])}
    own = {f"own/{rank.rank}": torch.full((2,), float(rank.rank) if write else -1.0)}
    if write:
        dcp.save(folder, 5, tensors | own, NOTE)
        result = whole.flatten().tolist()
    else:
        found = dcp.newest(folder)
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


def test_another_number_of_ranks_reads_it(ranks: Ranks, tmp_path: Path) -> None:
    written = ranks.run(sharded, ranks.run(door, world=1)[0], tmp_path, True, world=3)
    read = ranks.run(sharded, ranks.run(door, world=1)[0], tmp_path, False, world=2)
    assert [value[:2] for value in read] == [(3, written[0])] * 2
    assert [own for _, _, own in read] == [[0.0, 0.0], [1.0, 1.0]]
    found = dcp.newest(tmp_path)
    assert found is not None
    alone = {"w": torch.zeros(7, 5)}
    dcp.load(found, alone)
    assert alone["w"].flatten().tolist() == written[0]
