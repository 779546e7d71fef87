"""What tests marked `machine` need, as in `@pytest.mark.machine("root", "nft")`. `make machine` installs it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

# Programs in folders that no PATH has.
HIDDEN = {"postgres": "usr/lib/postgresql/*/bin/postgres"}

CAP_NET_ADMIN, CAP_SYS_ADMIN = 12, 21


def missing(needs: Iterable[str]) -> list[str]:
    """Those of `needs` that this machine lacks. "root" means that it may make mounts and network namespaces; anything
    else is a program."""
    return [need for need in needs if not (_is_root() if need == "root" else _has(need))]


def _is_root() -> bool:
    status = Path("/proc/self/status").read_text()
    allowed = int(next(line for line in status.splitlines() if line.startswith("CapEff:")).split()[1], 16)
    return os.geteuid() == 0 and all(allowed >> capability & 1 for capability in (CAP_NET_ADMIN, CAP_SYS_ADMIN))


def _has(program: str) -> bool:
    if program in HIDDEN:
        return any(Path("/").glob(HIDDEN[program]))
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is not None
