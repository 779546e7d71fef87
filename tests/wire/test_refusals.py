"""Who does not get in, how quickly they are told, and what they are told when nobody is there."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from nebula.errors import AuthError, PreflightError, UnreachableError
from nebula.federation.service import serve
from nebula.proto.v1.federation_pb2_grpc import FederationStub
from nebula.proto.v1.run_pb2 import JoinRequest
from nebula.runtime.gateway import Gateway
from nebula.security.pki import AUTHORITY, throwaway
from nebula.security.session import offer
from nebula.types import ROLE, PushTicket
from nebula.wan.transport import CHANNEL_OPTIONS, TLS_NAME
from tests.wire.wired import Wired, wired


@pytest.fixture
def wires(federate, tmp_path) -> Iterator[Wired]:
    with wired(federate(tmp_path / "federation")) as wires:
        yield wires


def untouched(wires: Wired) -> bool:
    """Nobody has joined, and nothing reached the coordinator that it could refuse."""
    return wires.hub.state.epochs == {} and wires.hub.tally.rejected == {}


# --- nobody there -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("why", ["nobody listens", "nothing answers", "no backend"])
def test_a_coordinator_that_does_not_answer(why, wires):
    gateway = wires.gateway("north", max_stall=0.5)
    with ExitStack() as stack:
        if why == "nobody listens":
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            gateway = wires.gateway("north", max_stall=0.5, address=f"127.0.0.1:{port}")
        elif why == "nothing answers":
            wires.relays["north"].pause()
        else:
            wires.server.stop(grace=None).wait()
        stack.callback(gateway.close)
        with pytest.raises(UnreachableError, match=r"0\.5 s") as caught:
            gateway.join()
    assert caught.value.exit_code == 4
    assert caught.value.hint


@pytest.mark.parametrize("call", ["plan", "push", "pull"])
def test_a_coordinator_that_falls_silent(call, wires):
    """A frame that leaves this process and goes nowhere is no sign of life."""
    gateway = wires.gateway("north", max_stall=0.5)
    gateway.join()
    wires.server.stop(grace=None).wait()
    ticket = PushTicket(role=ROLE, fragment="f0", round=0, base=0, weight=1.0)
    calls = {
        "plan": lambda: gateway.plan({}, None),
        "push": lambda: gateway.push(ticket, [b"x" * 3_000_000]),
        "pull": lambda: gateway.pull("update", "f0", 1),
    }
    with pytest.raises(UnreachableError):
        calls[call]()
    gateway.close()


# --- the wrong ones -----------------------------------------------------------------------------------------------


def refused_at_once(gateway: Gateway) -> AuthError:
    """Not for want of time: the gateways here would go on for a minute."""
    with pytest.raises(AuthError) as caught:
        gateway.join()
    gateway.close()
    assert gateway._caller.retries == 1
    assert caught.value.exit_code == 5
    return caught.value


def foreign(folder: Path) -> Path:
    """Identities of the same names from an authority that this federation has never heard of."""
    throwaway(folder, ["north"], [TLS_NAME])
    return folder


def test_a_cluster_of_another_authority(wires, tmp_path):
    stranger = foreign(tmp_path / "foreign") / "north"
    error = refused_at_once(wires.gateway("north", identity=str(stranger), max_stall=60.0))
    assert "CERTIFICATE_VERIFY_FAILED" in str(error)
    assert "same authority" in error.hint
    assert untouched(wires)


def test_a_cluster_that_trusts_the_coordinator_but_is_not_trusted_by_it(wires, tmp_path):
    stranger = foreign(tmp_path / "foreign") / "north"
    ours = wires.identity("north").authority_pem
    (stranger / AUTHORITY).write_bytes((stranger / AUTHORITY).read_bytes() + ours)
    error = refused_at_once(wires.gateway("north", identity=str(stranger), max_stall=60.0))
    assert "closes connections that show this certificate" in str(error)
    assert untouched(wires)


def test_a_cluster_that_passes_for_the_coordinator(wires):
    server, port = serve(wires.hub, wires.identity("south"), "127.0.0.1", 0)
    error = refused_at_once(wires.gateway("north", address=f"127.0.0.1:{port}", max_stall=60.0))
    server.stop(grace=None).wait()
    assert "nebula-coordinator" in str(error)
    assert untouched(wires)


def test_a_coordinator_without_tls(wires):
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        refused_at_once(wires.gateway("north", address=f"127.0.0.1:{port}", max_stall=60.0))
        server.stop(grace=None).wait()


def test_another_agreement(wires):
    error = refused_at_once(wires.gateway("north", agreement="sha256:another", max_stall=60.0))
    assert "same recipe" in error.hint or "another" in str(error)
    assert wires.hub.state.epochs == {}
    assert wires.hub.tally.rejected == {"AuthError": 1}
    (event,) = wires.federated.events("rejected")
    assert (event["cluster"], event["reason"]) == ("north", "AuthError")


def test_the_certificate_of_another_cluster(wires):
    with pytest.raises(AuthError, match="'south'"):
        wires.gateway("north", identity=str(wires.federated.folder / "pki" / "south"))
    # Whoever does not ask the gateway: north's genuine messages over south's connection.
    gateway = wires.gateway("north", stub=wires.stub("south"), max_stall=60.0)
    error = refused_at_once(gateway)
    assert "'south'" in str(error)
    assert "'north'" in str(error)
    assert wires.hub.state.epochs == {}
    assert wires.hub.tally.rejected == {"AuthError": 1}


def test_frames_of_another_cluster(wires):
    """A session of north's, of which south sends the frames."""
    gateway = wires.gateway("north", max_stall=60.0)
    gateway.join()
    gateway.close()
    gateway._caller.stub = wires.stub("south")
    with pytest.raises(AuthError, match="certificate"):
        gateway.pull("state", "f0", 0)
    gateway.close()
    assert wires.hub.tally.rejected == {"AuthError": 1}
    assert [event["cluster"] for event in wires.federated.events("rejected")] == ["south"]


def without_certificate(wires: Wired, address: str) -> grpc.Channel:
    credentials = grpc.ssl_channel_credentials(wires.identity("north").authority_pem)
    return grpc.secure_channel(
        address, credentials, options=(*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", TLS_NAME))
    )


def without_tls(wires: Wired, address: str) -> grpc.Channel:
    return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)


@pytest.mark.parametrize("client", [without_certificate, without_tls])
def test_clients_that_are_not_ours(client: Callable[[Wired, str], grpc.Channel], wires):
    message, _ = offer(wires.identity("north"), wires.federated.agreement.digest())
    with client(wires, f"127.0.0.1:{wires.port}") as channel, pytest.raises(grpc.RpcError) as caught:
        FederationStub(channel).Join(JoinRequest(offer=message), timeout=30.0)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert untouched(wires)


# --- the coordinator's own ----------------------------------------------------------------------------------------


def test_a_port_that_is_taken(wires):
    with pytest.raises(PreflightError, match=f"127.0.0.1:{wires.port}") as caught:
        serve(wires.hub, wires.identity("coordinator"), "127.0.0.1", wires.port)
    assert "coordinator.port" in caught.value.hint
