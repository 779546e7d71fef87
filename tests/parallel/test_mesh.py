from __future__ import annotations

import pytest
import torch

from nebula.errors import PreflightError
from nebula.parallel.mesh import Group, device_for, join, open_store


def test_a_missing_gpu_is_a_preflight_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_for("auto", 0) == device_for("cpu", 0) == torch.device("cpu")
    with pytest.raises(PreflightError, match="device: cuda"):
        device_for("cuda", 0)


def test_a_cluster_of_one_has_no_process_group() -> None:
    group = join("", None, 0, 1, torch.device("cpu"))
    assert group == Group(0, 1, torch.device("cpu"))
    assert not torch.distributed.is_initialized()
    assert group.total(torch.tensor([1.5, 2.0])) == [1.5, 2.0]
    assert group.most(3.0) == 3.0
    group.leave()


def test_each_door_has_its_own_port() -> None:
    (first, one), (second, two) = open_store(), open_store()
    assert first != second
    assert first == f"{one.host}:{one.port}"
    assert second == f"{two.host}:{two.port}"
