"""A real PostgreSQL server (Debian's, `apt-get install postgresql`) for as long as a test needs it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PASSWORD = "correct/horse&battery"


class Postgres:
    """Data, socket and log lie in `folder`; it listens on a loopback port and wants a password there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        (folder / "password").write_text(PASSWORD)
        if _owner():
            for path in (folder, folder / "password"):
                shutil.chown(path, _owner())
        self._do(
            "initdb", "--auth-host=scram-sha-256", "--auth-local=trust", "--pwfile=password", "--no-sync", "-U", "me"
        )
        self.start()

    def url(self, database: str = "postgres", password: str = PASSWORD) -> str:
        quoted = password.replace("/", "%2F").replace("&", "%26")
        return f"postgresql://me:{quoted}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        listen = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1"
        self._do("pg_ctl", "-w", "-l", "log", "-o", listen, "start")

    def stop(self, *, mode: str = "fast") -> None:
        """`mode` "immediate" is as good as SIGKILL, but leaves no shared memory behind."""
        self._do("pg_ctl", "-w", "-m", mode, "stop")

    def _do(self, program: str, *arguments: str) -> None:
        binary = max(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"))
        subprocess.run(
            [binary, "-D", "data", *arguments],
            cwd=self.folder,
            user=_owner(),
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )


def _owner() -> str | None:
    """PostgreSQL refuses to run as root."""
    return "postgres" if os.geteuid() == 0 else None


@contextmanager
def running() -> Iterator[Postgres]:
    with tempfile.TemporaryDirectory(prefix="nebula-postgres-") as folder:  # pytest's own folders are not for others
        server = Postgres(Path(folder))
        try:
            yield server
        finally:
            server.stop(mode="immediate")
