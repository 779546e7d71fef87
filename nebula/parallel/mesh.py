"""The process group of one cluster: who the ranks are, where they compute, and the sums they take together.

A cluster of one rank has no process group at all; every function here is then the identity.
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch does not list it as exported
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nebula.errors import PreflightError

# State that rests in host memory (base, residuals) is checkpointed by CPU collectives even when training is on a GPU.
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}

# Bounds the wait for a silent peer; a dead one is noticed by the supervisor (and, on gloo, by the next collective).
TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class Group:
    """The ranks of a cluster. `mesh` is where they compute, `host` the same ranks over CPU memory; both one axis,
    `dp_shard`, and None in a cluster of one."""

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh | None = None
    host: DeviceMesh | None = None

    def total(self, values: Tensor) -> list[float]:
        """Sum over ranks, on every rank. Waits for the device: the result is Python numbers."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def most(self, value: float) -> float:
        """Maximum over ranks, on every rank."""
        return self._reduce(torch.tensor([value], dtype=torch.float64, device=self.device), dist.ReduceOp.MAX)[0]

    def _reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> list[float]:
        if self.mesh is not None:
            dist.all_reduce(values, operation, group=self.mesh.get_group())
        result: list[float] = values.tolist()
        return result

    def leave(self) -> None:
        if self.mesh is not None:
            dist.destroy_process_group()


def device_for(wanted: str, rank: int) -> torch.device:
    """The device of a rank. "auto" takes a GPU where there is one. Raises PreflightError if "cuda" has none."""
    present = torch.cuda.is_available()
    if wanted == "cuda" and not present:
        raise PreflightError(
            f"rank {rank}: the cluster file says device: cuda, but torch sees no GPU here",
            hint="check the driver and the torch build, or say device: cpu",
        )
    if wanted == "cpu" or not present:
        return torch.device("cpu")
    # A scheduler may narrow each rank to one GPU or show all of them; both end on a GPU of its own.
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def open_store() -> tuple[str, TCPStore]:
    """Start the store at which the ranks meet; the port is taken, not guessed. Returns (host:port, store)."""
    host = _own_address()
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    return f"{host}:{store.port}", store


def join(address: str, store: TCPStore | None, rank: int, world: int, device: torch.device) -> Group:
    """Meet the other ranks at `address`. `store`: what open_store returned, on the rank that called it."""
    if world == 1:
        return Group(rank, world, device)
    if store is None:
        host, _, port = address.rpartition(":")
        store = TCPStore(host, int(port), is_master=False, timeout=TIMEOUT)
    dist.init_process_group(BACKENDS[device.type], store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("dp_shard",))
    host_mesh = mesh if device.type == "cpu" else init_device_mesh("cpu", (world,), mesh_dim_names=("dp_shard",))
    return Group(rank, world, device, mesh, host_mesh)


def _own_address() -> str:
    """The address other machines of the cluster reach this one at; loopback on a machine without any network."""
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # TEST-NET: chooses a route, sends nothing
        except OSError:
            return "127.0.0.1"
        address: str = probe.getsockname()[0]
        return address
