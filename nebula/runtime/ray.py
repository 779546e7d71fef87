"""Ranks and the gateway as Ray actors. Values pass between them by reference; the driver sees only small ones.

Ray reads its environment when it is imported, so nothing here imports it before `connect` has set it.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from nebula.errors import AuthError, NebulaError, PreflightError, RankFailure, UnreachableError, UsageError
from nebula.runtime.engine import Ranks, settle
from nebula.runtime.heads import driver_environment
from nebula.runtime.hosts import GatewayHost, RankHost
from nebula.types import Beat, Held, Packets, Payload, Pulled, PushTicket, RoundPlan, RoundReport

PLACEMENT_SECONDS = 60.0
"""How long the cluster has to make room for the ranks."""

GATEWAY_CALLS = 64
"""Calls that a gateway answers at once: the pushes and pulls of a round's fragments overlap; beats must not wait."""

GATEWAY_LIVES = 3
"""Gateways that may die under one call before the call fails."""

CONNECT_SECONDS = 5.0

NAME_SECONDS = 30.0
"""How long the actors of a driver that was killed may live on."""


def connect(address: str, namespace: str, token: Path | None) -> None:
    """Make this process a driver of the Ray cluster at `address` (host:port) and of no other. `token`: the file with
    the cluster's secret, None for a cluster without. Raises UsageError, UnreachableError, AuthError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UsageError(f"not the address of a Ray cluster: {address!r}", hint="give host:port")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise UnreachableError(
            f"no Ray cluster answers at {address}: {error}", hint="start it, or correct it"
        ) from error
    os.environ.update(driver_environment(address, token))
    import ray

    try:
        ray.init(
            address=address,
            namespace=namespace,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
        )
    except ray.exceptions.AuthenticationError as error:
        raise AuthError(f"the Ray cluster at {address} refused the token in {token}", hint="use its own") from error
    except (ConnectionError, RuntimeError) as error:
        raise UnreachableError(f"cannot join the Ray cluster at {address}: {error}") from error


def disconnect() -> None:
    """Leave the cluster; the actors of this driver end."""
    import ray

    ray.shutdown()


# --- in the driver: ranks -----------------------------------------------------------------------------------------


class RayGroup:
    """engine.Group of actors in one placement group. `device`: what the cluster file says; "auto" takes GPUs if there
    is one for every rank."""

    def __init__(self, ranks: Ranks, *, cluster: str, device: str = "cpu", patience: float = PLACEMENT_SECONDS) -> None:
        from ray.util.placement_group import placement_group

        gpus = float(device == "cuda" or (device == "auto" and _resources()[0].get("GPU", 0) >= ranks.count))
        bundle = {"CPU": 1.0, "GPU": gpus} if gpus else {"CPU": 1.0}
        self._actors: list[Any] = []
        self._place = placement_group([bundle] * ranks.count, strategy="PACK")
        try:
            if not self._place.wait(patience):
                raise _no_room(ranks.count, bundle, patience)
            self._create(ranks, cluster, gpus)
            self._errors([actor.build.options(num_returns=2).remote()[0] for actor in self._actors])
        except BaseException:
            self.kill()
            raise

    def _create(self, ranks: Ranks, cluster: str, gpus: float) -> None:
        import ray
        from ray.util.placement_group import placement_group_table
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        remote: Any = ray.remote  # its types know no actors
        kind = remote(num_cpus=1, num_gpus=gpus, max_restarts=0, concurrency_groups={"control": 1})(RankHost)
        nodes = placement_group_table(self._place)["bundles_to_node_id"]
        for rank, index in enumerate(neighbours(nodes)):
            where = PlacementGroupSchedulingStrategy(self._place, placement_group_bundle_index=index)
            name = _free(f"nebula-rank-{cluster}-{rank}")
            self._actors.append(kind.options(name=name, scheduling_strategy=where).remote(ranks, rank))

    def call(self, method: str, *args: Any) -> list[Any]:
        return self._fetch(self._ask(self._actors, method, args))

    def call_first(self, method: str, *args: Any) -> Any:
        return self._fetch(self._ask(self._actors[:1], method, args))[0]

    def references(self, method: str, *args: Any) -> Sequence[Any]:
        return self._ask(self._actors, method, args)

    def kill(self) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        remove_placement_group(self._place)

    def pids(self) -> list[int]:
        """Process ids in rank order, also while the ranks are busy."""
        import ray

        pids: list[int] = ray.get([a.ping.options(concurrency_group="control").remote() for a in self._actors])
        return pids

    def _ask(self, actors: Sequence[Any], method: str, args: tuple[Any, ...]) -> list[Any]:
        answers = [actor.call.options(num_returns=2).remote(method, *args) for actor in actors]
        self._errors([error for error, _ in answers])
        return [value for _, value in answers]

    def _errors(self, references: Sequence[Any]) -> None:
        """Wait for all ranks; raise what `settle` says, with the group killed."""
        import ray

        waiting = {reference: rank for rank, reference in enumerate(references)}

        def outcome(timeout: float | None) -> tuple[int, NebulaError | None] | None:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=timeout)
            if not ready:
                return None
            rank = waiting.pop(ready[0])
            return rank, _get(ready[0], rank)

        try:
            settle(len(references), outcome)
        except NebulaError:
            self.kill()
            raise

    def _fetch(self, references: Sequence[Any]) -> list[Any]:
        return [_get(reference, rank) for rank, reference in enumerate(references)]


def neighbours(nodes: Mapping[int, str]) -> list[int]:
    """The order of bundles (index → node) in which ranks of one node are neighbours."""
    return sorted(nodes, key=lambda index: (nodes[index], index))


def _get(reference: Any, rank: int) -> Any:
    """The value. Raises RankFailure if the rank is gone, or what a rank left behind."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:  # of our own code in the actor, or an argument that was lost
        if isinstance(error.cause, RayError):
            raise RankFailure(rank, f"rank {rank}: {_first_line(error.cause)}") from error
        raise NebulaError(f"rank {rank} failed: {_first_line(error)}") from error
    except RayError as error:
        raise RankFailure(rank, f"rank {rank} died: {_first_line(error)}") from error


def _free(name: str) -> str:
    """Wait until no actor has the name: the cluster sees the death of an earlier one with a delay."""
    from ray.util import list_named_actors  # get_actor would go on finding our own dead ones

    until = time.monotonic() + NAME_SECONDS
    while name in list_named_actors():
        if time.monotonic() > until:
            raise PreflightError(
                f"an actor called {name} runs in this Ray cluster already", hint="stop the other agent of this cluster"
            )
        time.sleep(0.01)
    return name


def _no_room(count: int, bundle: Mapping[str, float], patience: float) -> PreflightError:
    wanted = " and ".join(f"{amount:g} {what}" for what, amount in bundle.items())
    total, free = _resources()
    there = ", ".join(f"{total.get(what, 0):g} {what} ({free.get(what, 0):g} free)" for what in ("CPU", "GPU"))
    return PreflightError(
        f"no room for {count} ranks of {wanted} within {patience:g} s: the Ray cluster has {there}",
        hint="lower the cluster's ranks, or add machines",
    )


def _resources() -> tuple[Mapping[str, float], Mapping[str, float]]:
    """What the Ray cluster has, and what of it is free."""
    import ray

    untyped: Any = ray
    return untyped.cluster_resources(), untyped.available_resources()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- the gateway --------------------------------------------------------------------------------------------------


class RayTransport:
    """types.Transport over a gateway in an actor. A gateway that dies is replaced; it joins again by itself.
    `gateway`: an importable "module:Class", built there as `Class(**settings)`."""

    def __init__(
        self, cluster: str, settings: Mapping[str, Any], gateway: str = "nebula.runtime.gateway:Gateway"
    ) -> None:
        self._name = f"nebula-gateway-{cluster}"
        self._arguments = (gateway, dict(settings))
        self._replacing = threading.Lock()
        self._actor = self._create()

    def join(self) -> tuple[bytes, bytes]:
        agreement, tokenizer = self._ask("join")
        return agreement, tokenizer

    def plan(self, held: Mapping[str, Held], report: RoundReport | None) -> RoundPlan:
        plan: RoundPlan = self._ask("plan", held, report)
        return plan

    def beat(self, beat: Beat) -> None:
        self._ask("beat", beat)

    def push(self, ticket: PushTicket, packets: Packets) -> Literal["accepted", "duplicate", "late"]:
        (verdict,) = self._call("push", 2, ticket, *packets)
        said: Literal["accepted", "duplicate", "late"] = _get(verdict, 0)
        return said

    def pull(self, kind: Literal["update", "state"], fragment: str, version: int) -> tuple[Pulled, Payload]:
        head, payload = self._call("pull", 3, kind, fragment, version)
        return _get(head, 0), payload

    def close(self) -> None:
        import ray

        self._ask("close")
        ray.kill(self._actor)

    def pid(self) -> int:
        import ray

        pid: int = ray.get(self._actor.ping.remote())
        return pid

    def _ask(self, method: str, *args: Any) -> Any:
        (answer,) = self._call("call", 2, method, *args)
        return _get(answer, 0)

    def _call(self, method: str, returns: int, *args: Any) -> list[Any]:
        """References to the answer's values, once it is there and not an error."""
        from ray.exceptions import RayActorError

        for _ in range(GATEWAY_LIVES):
            actor = self._actor
            values: list[Any]
            error, *values = getattr(actor, method).options(num_returns=returns).remote(*args)
            try:
                refused = _get(error, 0)
            except RankFailure as failure:
                if not isinstance(failure.__cause__, RayActorError):
                    raise
                self._replace(actor)
                continue
            if refused is not None:
                raise refused
            return values
        raise NebulaError(
            f"the gateway died {GATEWAY_LIVES} times under one call",
            hint="see its log in the Ray cluster; a process that ends at once usually lacks memory",
        )

    def _create(self) -> Any:
        import ray

        remote: Any = ray.remote  # its types know no actors
        kind = remote(num_cpus=0, max_restarts=0, max_concurrency=GATEWAY_CALLS)(GatewayHost)
        return kind.options(name=_free(self._name)).remote(*self._arguments)

    def _replace(self, dead: Any) -> None:
        import ray

        with self._replacing:  # several calls notice; one replaces
            if self._actor is dead:
                ray.kill(dead)  # or this driver goes on believing that it holds the name
                self._actor = self._create()
