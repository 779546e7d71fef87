"""`nebula doctor`: can this machine run Nebula, and what to do if not?"""

from __future__ import annotations

import errno
import importlib.metadata
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from nebula.cli import output
from nebula.cli.prepare import cache_folder
from nebula.config import Federation
from nebula.errors import PreflightError
from nebula.metrics import units
from nebula.recipe import load_federation
from nebula.wan.link import congestion, prefer_bbr

PYTHON = (3, 11)
TORCH = (2, 11)
RANK_BYTES = 1_500_000_000
"""Of memory, for one rank: torch, a small model and its optimizer."""
DISK_BYTES = 2_000_000_000


@dataclass(frozen=True, slots=True)
class Check:
    """`fix` says what to do where the status is not ok."""

    group: str
    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""


def command(
    clusters: Annotated[Path | None, typer.Option(help="Also check what this cluster file asks for.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check this machine. Ends with exit code 3 if something must be fixed first."""
    federation = load_federation(clusters) if clusters else None
    checks = [*_software(), *_machine(federation), *_network(federation)]
    failed = [check for check in checks if check.status == "fail"]
    fields = {"checks": [asdict(check) for check in checks]}
    if failed and json:
        print(output.envelope("doctor", ok=False, **fields))
        raise typer.Exit(PreflightError.exit_code)
    following = f"nebula run trainers/code_moe.py --clusters {clusters or 'clusters/laptop.yaml'}"
    output.result("doctor", fields, text=describe(checks), next="" if failed else following, as_json=json)
    if failed:
        raise PreflightError(f"{len(failed)} of {len(checks)} checks failed", hint=failed[0].fix)


def describe(checks: list[Check]) -> str:
    """Grouped lines, with the fix below whatever is not ok."""
    lines: list[str] = []
    for i, check in enumerate(checks):
        if i == 0 or checks[i - 1].group != check.group:
            lines.append(check.group)
        lines.append(f"  {check.status:<4}  {check.name:<20} {check.found}")
        if check.status != "ok":
            lines.append(f"        {'':<20} → {check.fix}")
    return "\n".join(lines)


# --- software -----------------------------------------------------------------------------------------------------


def _software() -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    wanted = ".".join(map(str, PYTHON))
    yield _check("software", "python", sys.version_info >= PYTHON, version, f"install Python {wanted} or newer")
    yield from _torch()
    try:
        yield Check("software", "ray", "ok", importlib.metadata.version("ray"))
    except importlib.metadata.PackageNotFoundError:
        yield Check("software", "ray", "warn", "missing", "pip install 'nebula[ray]', or use --engine local")


def _torch() -> Iterator[Check]:
    import torch

    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2] if part.isdecimal())
    wanted = ".".join(map(str, TORCH))
    yield _check("software", "torch", found >= TORCH, torch.__version__, f"pip install 'torch>={wanted}'")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Check("software", "device", "ok", ", ".join(devices) or "cpu only")


# --- machine ------------------------------------------------------------------------------------------------------


def _machine(federation: Federation | None) -> Iterator[Check]:
    clusters = list(federation.clusters.values()) if federation else []
    ranks = sum(c.ranks for c in clusters) or 1
    threads = sum(c.ranks * c.threads for c in clusters) or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    slow = f"the clusters ask for {threads} threads; it works, but slowly"
    yield _check("machine", "cores", cores >= threads, str(cores), slow, otherwise="warn")
    memory, needed = _available_memory(), ranks * RANK_BYTES
    found = f"{units.size(memory)} available" if memory else "unknown on this system"
    less = f"{ranks} ranks want about {units.size(needed)}; use fewer ranks or a smaller model"
    yield _check("machine", "memory", memory is None or memory >= needed, found, less, otherwise="warn")
    free = shutil.disk_usage(Path.cwd()).free
    yield _check(
        "machine", "disk", free >= DISK_BYTES, f"{units.size(free)} free", "free some, or run elsewhere (--out)"
    )
    yield _cache(cache_folder())
    if any(c.device == "cuda" for c in clusters):
        yield _cuda()


def _available_memory() -> int | None:
    """Bytes, where the kernel tells."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _cache(folder: Path) -> Check:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return Check("machine", "cache folder", "ok", str(folder))
    except OSError as error:
        fix = "make it writable, or point XDG_CACHE_HOME at another folder"
        return Check("machine", "cache folder", "fail", f"{folder}: {error.strerror}", fix)


def _cuda() -> Check:
    import torch

    count = torch.cuda.device_count()
    fix = "fine where this machine is none of those clusters; else set `device: auto` or install the driver"
    return _check("machine", "cuda", count > 0, f"{count} devices", fix, otherwise="warn")


# --- network ------------------------------------------------------------------------------------------------------


def _network(federation: Federation | None) -> Iterator[Check]:
    yield _tcp_info()
    yield _congestion()
    if federation is None:
        return
    end = federation.coordinator
    ports = [("coordinator", end.host, end.port)]
    for name, cluster in federation.clusters.items():
        ports.append((f"{name} ray", "127.0.0.1", cluster.ray.port))
        ports.append((f"{name} dashboard", "127.0.0.1", cluster.ray.dashboard_port or 0))
    for name, host, port in ports:
        if port:
            yield _port(name, host, port)


def _tcp_info() -> Check:
    """Round-trip times and retransmissions are read from the kernel."""
    fix = "link statistics will lack round-trip times; they need Linux"
    option = getattr(socket, "TCP_INFO", None)
    if option is None:
        return Check("network", "TCP_INFO", "warn", "not on this system", fix)
    try:
        with socket.socket() as probe:
            probe.getsockopt(socket.IPPROTO_TCP, option, 256)
        return Check("network", "TCP_INFO", "ok", "available")
    except OSError as error:
        return Check("network", "TCP_INFO", "warn", str(error.strerror), fix)


def _congestion() -> Check:
    """How fast payloads are sent over a link that loses packets."""
    fix = "links that lose packets will be slow; load tcp_bbr and allow it (net.ipv4.tcp_allowed_congestion_control)"
    with socket.socket() as probe:
        prefer_bbr(probe)
        found = congestion(probe)
    return _check("network", "congestion control", found == "bbr", found or "not on this system", fix, otherwise="warn")


def _port(name: str, host: str, port: int) -> Check:
    """Free to listen on; a host that is another machine cannot be checked from here."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
        return Check("network", name, "ok", f"{host}:{port} is free")
    except socket.gaierror:
        fix = f"correct coordinator.host, or make {host} resolvable on this machine"
        return Check("network", name, "warn", f"{host} is unknown here", fix)
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            return Check("network", name, "ok", f"{host} is another machine")
        fix = "end what listens there, or choose another port in the cluster file (0 takes any)"
        return Check("network", name, "fail", f"{host}:{port}: {error.strerror}", fix)


def _check(
    group: str, name: str, good: bool, found: str, fix: str, *, otherwise: Literal["warn", "fail"] = "fail"
) -> Check:
    return Check(group, name, "ok" if good else otherwise, found, "" if good else fix)
