"""One Ray head per cluster, on this machine, without touching any other Ray that runs here.

`ray stop` ends every Ray process of the host and Ray turns authentication on or off by what lies in the home folder,
so a head gets its own session, home, temporary folder, ports and token, and only its own processes are ever signalled.
"""

from __future__ import annotations

import errno
import os
import random
import secrets
import shutil
import signal
import site
import socket
import sys
import tempfile
import time
from pathlib import Path

from nebula.errors import PreflightError
from nebula.runtime.supervise import Child

HOST = "127.0.0.1"

CHOICE = range(20_000, 32_768)
"""Ports we choose lie below those the kernel gives to anyone who asks for any (32768 …), so that none of these can
take one between our choice and its use."""

STORE_BYTES = 1 << 30
"""Ray's object store, a ceiling and not a reservation: the packets of a round in flight; the rest spills to disk."""

LONGEST_SOCKET = len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.12")
SOCKET_LIMIT = 107  # bytes in a Unix socket's path

POLL_SECONDS = 0.05


class Head:
    """A Ray head for one cluster. Ports 0 and a port's default are free ones; no dashboard unless it has a port."""

    def __init__(self, name: str, *, log: Path, cpus: int, port: int = 0, dashboard_port: int | None = None) -> None:
        self.name = name
        self._port = _chosen(port, f"clusters.{name}.ray.port")
        self._dashboard_port = dashboard_port
        if dashboard_port is not None:
            self._dashboard_port = _chosen(dashboard_port, f"clusters.{name}.ray.dashboard_port")
        self._folder = Path(tempfile.mkdtemp(prefix="nebula-"))
        if len(str(self._folder)) + LONGEST_SOCKET > SOCKET_LIMIT:
            self._folder.rmdir()
            raise PreflightError(
                f"the folder for temporary files, {tempfile.gettempdir()}, has too long a name for Ray's sockets",
                hint=f"set TMPDIR to a folder of at most {SOCKET_LIMIT - LONGEST_SOCKET - 16} letters",
            )
        self._child = Child(
            f"ray head {name}", self._argv(cpus), log=log, env=self._environment(), orphaned=signal.SIGTERM
        )

    @property
    def address(self) -> str:
        return f"{HOST}:{self._port}"

    @property
    def dashboard(self) -> str | None:
        """Its URL, None without one."""
        return None if self._dashboard_port is None else f"http://{HOST}:{self._dashboard_port}"

    @property
    def token(self) -> Path:
        """The file with the secret that every process of this Ray cluster must show."""
        return self._folder / "token"

    @property
    def pid(self) -> int:
        return self._child.pid

    def start(self) -> None:
        """Returns at once; `wait` says when it is ready."""
        self._folder.mkdir(exist_ok=True)
        (self._folder / "home").mkdir(exist_ok=True)
        if not self.token.exists():
            with os.fdopen(os.open(self.token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_hex(32))
        shutil.rmtree(self._temp, ignore_errors=True)  # what an earlier life left would look like readiness
        self._child.start()

    def wait(self, timeout: float = 60.0) -> None:
        """Until drivers can connect. Raises PreflightError with the log's last lines when it dies or takes longer."""
        until = time.monotonic() + timeout
        while not self.ready():
            if (code := self._child.poll()) is not None:
                raise PreflightError(f"Ray of cluster {self.name} ended with exit code {code}:\n{self._child.tail()}")
            if time.monotonic() > until:
                raise PreflightError(
                    f"Ray of cluster {self.name} was not ready after {timeout:g} s:\n{self._child.tail()}"
                )
            time.sleep(POLL_SECONDS)

    def poll(self) -> int | None:
        return self._child.poll()

    def tail(self) -> str:
        return self._child.tail()

    def stop(self) -> None:
        """End its processes, and no others, and remove its temporary folder."""
        self._child.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def kill(self) -> None:
        """End its processes at once, as a power cut would."""
        self._child.kill()

    @property
    def _temp(self) -> Path:
        return self._folder / "ray"

    def ready(self) -> bool:
        """Whether drivers can connect. Ray leaves its address for them once all its parts run; a driver that comes
        earlier waits long."""
        if not (self._temp / "ray_current_cluster").exists():
            return False
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            return probe.connect_ex((HOST, self._port)) == 0

    def _argv(self, cpus: int) -> list[str]:
        shown = self._dashboard_port is not None
        options = {
            "node-ip-address": HOST,
            "port": self._port,
            "ray-client-server-port": free_port(),  # 0 is not allowed, nor can it be switched off
            "dashboard-agent-listen-port": 0,
            "dashboard-agent-grpc-port": 0,
            "runtime-env-agent-port": 0,
            "metrics-export-port": 0,
            "node-manager-port": 0,
            "object-manager-port": 0,
            "min-worker-port": 0,
            "max-worker-port": 0,
            "num-cpus": cpus,
            "object-store-memory": STORE_BYTES,
            "temp-dir": self._temp,
            "include-dashboard": str(shown).lower(),
            "include-log-monitor": str(shown).lower(),
        }
        if shown:
            options |= {"dashboard-host": HOST, "dashboard-port": self._dashboard_port or 0}
        flags = [f"--{name}={value}" for name, value in options.items()]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--no-monitor"]
        return [*command, "--disable-usage-stats", *flags]

    def _environment(self) -> dict[str, str]:
        foreign = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return {
            **foreign,
            **driver_environment(self.address, self.token),
            "HOME": str(self._folder / "home"),
            "PYTHONUSERBASE": site.getuserbase(),  # would move with the home
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # or SIGTERM takes 30 s
        }


def driver_environment(address: str, token: Path | None) -> dict[str, str]:
    """What Ray must find in the environment, before it is imported, to join the cluster at `address`."""
    mode = {"RAY_AUTH_MODE": "disabled"} if token is None else {"RAY_AUTH_MODE": "token"}
    if token is not None:
        mode["RAY_AUTH_TOKEN_PATH"] = str(token)
    if address.startswith(f"{HOST}:"):
        # Ray takes loopback for the machine's outward address and listens on all of them, unless this says otherwise.
        mode["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    return mode


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    for port in random.SystemRandom().sample(CHOICE, 100):
        if not _taken("", port):
            return port
    raise PreflightError("found no free port", hint=f"free some of {CHOICE.start} … {CHOICE.stop - 1}")


def check_port(host: str, port: int, setting: str) -> None:
    """Raises PreflightError if something listens there. `setting`: what the user may change."""
    if _taken(host, port):
        raise PreflightError(
            f"port {port} on {host or 'this machine'} is in use", hint=f"change {setting}, or 0 takes a free one"
        )


def _chosen(port: int, setting: str) -> int:
    if port == 0:
        return free_port()
    check_port(HOST, port, setting)
    return port


def _taken(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: closed connections do not count
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise PreflightError(
                    f"cannot listen on {host}:{port}: {error.strerror}", hint="choose another"
                ) from error
            return True
        return False
