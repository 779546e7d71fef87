"""From a recipe and a cluster file to a run's folder: resolve, check, agree, issue identities."""

from __future__ import annotations

import hashlib
import os
import secrets
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from nebula.cli.rundir import RunDir, create
from nebula.config import Federation, Run, agree
from nebula.errors import PreflightError, UsageError
from nebula.recipe import load_federation, load_recipe

BYTES_PER_PARAMETER = 120
"""On disk, at the most: two coordinator states of four fp32 copies, two checkpoints of five per cluster, deltas."""


def cache_folder() -> Path:
    """Where prepared data is kept between runs: the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nebula"


def resolve(recipe: Path, clusters: Path, overrides: Sequence[str]) -> tuple[Run, Federation]:
    return load_recipe(recipe, overrides), load_federation(clusters)


def run_command(recipe: Path, clusters: Path, overrides: Sequence[str]) -> str:
    """The command line that trains what was looked at."""
    settings = [word for setting in overrides for word in ("--set", setting)]
    return shlex.join(["nebula", "run", str(recipe), "--clusters", str(clusters), *settings])


def prepare(run: Run, federation: Federation, out: Path) -> RunDir:
    """Raises UsageError, PreflightError; leaves nothing behind unless it succeeds."""
    from nebula.data.open import prepare as prepare_data
    from nebula.security.pki import throwaway
    from nebula.wan.transport import TLS_NAME

    check_room(run, federation, out)
    check_ports(federation)
    data = prepare_data(run.data, run.model.vocab, sorted(federation.clusters), cache_folder())
    digest = "sha256:" + hashlib.sha256(data.tokenizer.encode()).hexdigest()
    try:
        agreement = agree(
            run, federation, tokenizer=digest, unigram_entropy=data.unigram_entropy, id=secrets.token_hex(6)
        )
    except ValueError as error:
        raise UsageError(f"the recipe and the cluster file do not fit together: {error}") from error

    def fill(folder: Path) -> None:
        throwaway(folder / "pki", list(federation.clusters), [TLS_NAME, "localhost", "127.0.0.1"])

    return create(out, agreement, federation, data.tokenizer, fill)


def check_room(run: Run, federation: Federation, out: Path) -> None:
    """Refuse to start what cannot be kept. Raises PreflightError."""
    from nebula.models.init import count

    needed = BYTES_PER_PARAMETER * count(run.model) * (1 + len(federation.clusters))
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise PreflightError(
            f"{existing} has {free / 1e6:.0f} MB free; this run keeps up to {needed / 1e6:.0f} MB there",
            hint="free some space or choose another disk with --out",
        )


def check_ports(federation: Federation) -> None:
    """Raises PreflightError where a port that the cluster file names is taken."""
    from nebula.runtime.heads import HOST, check_port

    wanted = {"coordinator.port": (federation.coordinator.host, federation.coordinator.port)}
    for name, cluster in federation.clusters.items():
        wanted[f"clusters.{name}.ray.port"] = (HOST, cluster.ray.port)
        wanted[f"clusters.{name}.ray.dashboard_port"] = (HOST, cluster.ray.dashboard_port or 0)
    for setting, (host, port) in wanted.items():
        if port:
            check_port(host, port, setting)
