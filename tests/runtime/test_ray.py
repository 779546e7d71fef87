"""Ray heads, and the gateway in an actor."""

from __future__ import annotations

import os
import signal
import socket
import stat
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from nebula.errors import AuthError, NebulaError, PreflightError, UnreachableError, UsageError
from nebula.runtime.engine import Ranks
from nebula.runtime.heads import CHOICE, Head, check_port, driver_environment, free_port
from nebula.runtime.ray import RayGroup, RayTransport, connect, neighbours
from nebula.runtime.supervise import members
from nebula.types import PushTicket

# --- without a cluster --------------------------------------------------------------------------------------------


def test_a_port_in_use_is_named_with_what_to_change():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(PreflightError, match=f"port {port} on 127.0.0.1 is in use") as caught:
            check_port("127.0.0.1", port, "coordinator.port")
    assert "coordinator.port" in caught.value.hint
    check_port("127.0.0.1", port, "coordinator.port")


def test_a_free_port_is_free_and_not_one_the_kernel_gives_away():
    port = free_port()
    assert port in CHOICE
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_a_head_refuses_a_port_in_use_before_it_leaves_anything_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(PreflightError) as caught:
        Head("north", log=tmp_path / "log", cpus=1, port=server.getsockname()[1])
    assert "clusters.north.ray.port" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_folder_too_deep_for_sockets_is_refused(tmp_path, monkeypatch):
    deep = tmp_path / ("d" * 60)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(PreflightError, match="too long a name"):
        Head("north", log=tmp_path / "log", cpus=1)
    assert list(deep.iterdir()) == []


def test_authentication_is_never_left_to_what_lies_in_the_home_folder(tmp_path):
    assert driver_environment("10.0.0.1:6379", None) == {"RAY_AUTH_MODE": "disabled"}
    with_token = driver_environment("10.0.0.1:6379", tmp_path / "token")
    assert with_token == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}


@pytest.mark.parametrize("address", ["auto", "", "here", "ray://here:10001"])
def test_only_a_stated_cluster_is_joined(address):
    with pytest.raises((UsageError, UnreachableError)):
        connect(address, "tests", None)


def test_a_cluster_that_is_not_there_is_unreachable_at_once():
    with pytest.raises(UnreachableError, match="no Ray cluster answers"):
        connect(f"127.0.0.1:{free_port()}", "tests", None)


def test_ranks_of_one_node_are_neighbours():
    assert neighbours({0: "b", 1: "a", 2: "b", 3: "a"}) == [1, 3, 0, 2]


# --- with one -----------------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_a_head_that_ends_early_says_so_and_can_be_started_again(tmp_path):
    head = Head("south", log=tmp_path / "log", cpus=1)
    head.start()
    pid = head.pid
    head.kill()
    with pytest.raises(PreflightError, match="Ray of cluster south ended with exit code -9"):
        head.wait()
    assert members(pid) == []
    head.start()
    head.wait()
    pid = head.pid
    assert len(members(pid)) > 3
    head.stop()
    assert members(pid) == []
    assert not head.token.parent.exists()


@pytest.mark.ray
def test_a_head_is_private(head):
    """Its processes are in its session, listen on loopback only and want a token that others cannot read."""
    assert stat.S_IMODE(head.token.stat().st_mode) == 0o600
    assert set(_listening(members(head.pid))) == {"127.0.0.1"}


def _listening(pids):
    inodes = set()
    for pid in pids:
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            link = os.readlink(f"/proc/{pid}/fd/{descriptor}")
            inodes |= {link[8:-1]} if link.startswith("socket:[") else set()
    for table in ("tcp", "tcp6"):
        with open(f"/proc/net/{table}") as lines:
            for _, local, _, state, *rest in map(str.split, list(lines)[1:]):
                if state == "0A" and rest[5] in inodes:
                    yield socket.inet_ntoa(bytes.fromhex(local.partition(":")[0])[-4:][::-1])


@pytest.mark.ray
def test_ranks_that_do_not_fit_are_refused_with_what_is_there(head):
    ranks = Ranks(count=9, settings={"note": ""}, worker="fakes:FakeWorker")
    with pytest.raises(PreflightError, match=r"no room for 9 ranks of 1 CPU within 0\.1 s: the Ray cluster has 4 CPU"):
        RayGroup(ranks, cluster="crowd", patience=0.1)


@pytest.fixture(scope="module")
def transport(head):
    transport = RayTransport("north", {}, gateway="fakes:FakeGateway")
    yield transport
    transport.close()


@pytest.mark.ray
def test_packets_and_payloads_pass_by_reference(transport):
    group = RayGroup(Ranks(count=2, settings={"note": ""}, worker="fakes:FakeWorker"), cluster="by-reference")
    packets = group.references("encode", "f0")
    ticket = PushTicket(role="model", fragment="f0", round=0, base=0, weight=1.0)
    assert transport.push(ticket, packets) == "accepted"
    assert transport.push(ticket, packets[::-1]) == "late"
    pulled, payload = transport.pull("update", "f0", 7)
    assert (pulled.status, pulled.version) == ("ready", 7)
    assert not isinstance(payload, bytes)
    assert group.call("length", payload) == [1_000_000, 1_000_000]
    group.kill()


@pytest.mark.ray
def test_the_gateway_answers_several_calls_at_once_and_has_no_torch(transport):
    assert transport.join() == (b"agreement", b"tokenizer")
    assert transport.plan({}, None).reason == "light"
    with ThreadPoolExecutor(2) as pool:  # each waits for the other inside the gateway
        calls = [pool.submit(transport.pull, "update", "both", version) for version in (1, 2)]
        assert [call.result()[0].version for call in calls] == [1, 2]


@pytest.mark.ray
def test_what_the_gateway_refuses_comes_through_as_itself(head, transport):
    with pytest.raises(AuthError, match="refused"):
        transport.pull("update", "secret", 1)
    refusing = RayTransport("refusing", {"behaviour": "refuse"}, gateway="fakes:FakeGateway")
    with pytest.raises(AuthError, match="not your certificate"):
        refusing.join()


@pytest.mark.ray
def test_a_gateway_that_dies_is_replaced(transport):
    pid = transport.pid()
    os.kill(pid, signal.SIGKILL)
    assert transport.plan({}, None).action == "done"
    assert transport.pid() != pid


@pytest.mark.ray
def test_a_gateway_that_dies_of_the_call_is_not_replaced_for_ever(head):
    mortal = RayTransport("mortal", {"behaviour": "die"}, gateway="fakes:FakeGateway")
    with pytest.raises(NebulaError, match="the gateway died 3 times under one call"):
        mortal.plan({}, None)
