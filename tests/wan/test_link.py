"""The link monitor: kernel counters against what was really sent, and the arithmetic of the estimates."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula.errors import UnreachableError
from nebula.wan.link import LinkMonitor, LinkStats, Wire, WireMeter, congestion, listeners_prefer_bbr


@contextmanager
def listening(host: str = "127.0.0.1", family: int = socket.AF_INET) -> Iterator[tuple[socket.socket, int]]:
    dual = family == socket.AF_INET6 and host == "::"
    with socket.create_server((host, 0), family=family, dualstack_ipv6=dual) as server:
        yield server, server.getsockname()[1]


def exchange(client: socket.socket, server: socket.socket, up: int, down: int) -> None:
    """Move this many bytes each way and have every one of them read."""

    def move(source: socket.socket, sink: socket.socket, size: int) -> None:
        sender = threading.Thread(target=source.sendall, args=(bytes(size),))
        sender.start()
        while size:
            size -= len(sink.recv(min(size, 65536)))
        sender.join()

    move(client, server, up)
    move(server, client, down)


@settings(deadline=None, max_examples=10)
@given(st.lists(st.tuples(st.integers(0, 300_000), st.integers(0, 300_000)), min_size=1, max_size=3))
def test_counts_are_the_bytes_sent_also_after_the_connections_closed(plan: list[tuple[int, int]]):
    with listening() as (server, port):
        meter = WireMeter("127.0.0.1", port)
        up = down = 0
        for sent, received in plan:
            with socket.create_connection(("127.0.0.1", port)) as client:
                other, _ = server.accept()
                with other:
                    exchange(client, other, sent, received)
                    up, down = up + sent, down + received
                    wire = meter.sample()
                    assert (wire.up_bytes, wire.down_bytes, wire.available) == (up, down, True)
            assert meter.sample() == wire


def test_a_connection_that_goes_on_is_counted_once():
    with listening() as (server, port), socket.create_connection(("127.0.0.1", port)) as client:
        other, _ = server.accept()
        with other:
            meter = WireMeter("127.0.0.1", port)
            for turn in range(1, 4):
                exchange(client, other, 1000, 10)
                wire = meter.sample()
                assert (wire.up_bytes, wire.down_bytes) == (1000 * turn, 10 * turn)


def test_only_connections_to_the_peer_count():
    with (
        listening() as (server, port),
        listening() as (stranger, elsewhere),
        socket.create_connection(("127.0.0.1", port)) as client,
        socket.create_connection(("127.0.0.1", elsewhere)) as unrelated,
    ):
        other, _ = server.accept()
        foreign, _ = stranger.accept()
        with other, foreign:
            exchange(client, other, 5, 7)
            exchange(unrelated, foreign, 100, 100)
            wire = WireMeter("127.0.0.1", port).sample()
            assert (wire.up_bytes, wire.down_bytes) == (5, 7)


@pytest.mark.parametrize(
    ("listen", "family", "connect", "name"),
    [
        ("127.0.0.1", socket.AF_INET, "127.0.0.1", "localhost"),
        ("::1", socket.AF_INET6, "::1", "::1"),
        ("::", socket.AF_INET6, "::ffff:127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", socket.AF_INET, "127.0.0.1", "::ffff:127.0.0.1"),
    ],
    ids=["hostname", "ipv6", "v4-mapped socket", "v4-mapped name"],
)
def test_a_peer_is_recognised_however_its_address_is_written(listen: str, family: int, connect: str, name: str):
    with listening(listen, family) as (server, port), socket.create_connection((connect, port)) as client:
        other, _ = server.accept()
        with other:
            exchange(client, other, 11, 13)
            wire = WireMeter(name, port).sample()
            assert (wire.up_bytes, wire.down_bytes) == (11, 13)


def test_sampling_neither_disturbs_nor_leaks_descriptors():
    with listening() as (server, port), socket.create_connection(("127.0.0.1", port)) as client:
        other, _ = server.accept()
        reader, writer = os.pipe()
        with other:
            meter = WireMeter("127.0.0.1", port)
            client.settimeout(5)
            before = sorted(os.listdir("/proc/self/fd"))
            meter.sample()
            assert sorted(os.listdir("/proc/self/fd")) == before
            assert client.gettimeout() == 5
            exchange(client, other, 3, 3)
            os.write(writer, b"x")
            assert os.read(reader, 1) == b"x"
        os.close(reader)
        os.close(writer)


def test_without_tcp_info_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch):
    with listening() as (server, port), socket.create_connection(("127.0.0.1", port)) as client:
        other, _ = server.accept()
        with other:
            exchange(client, other, 10, 10)
            monkeypatch.delattr(socket, "TCP_INFO")
            assert WireMeter("127.0.0.1", port).sample() == Wire(0, 0, 0, available=False)


def test_a_kernel_whose_tcp_info_is_too_short_is_not_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(socket.socket, "getsockopt", lambda *_: bytes(104))
    assert WireMeter("127.0.0.1", 1).sample() == Wire(0, 0, 0, available=False)


def test_a_name_that_does_not_resolve_is_reported():
    with pytest.raises(UnreachableError, match=r"nowhere\.invalid") as caught:
        WireMeter("nowhere.invalid", 7443)
    assert caught.value.hint


# --- estimates ----------------------------------------------------------------------------------------------------


def test_nothing_measured_is_zero():
    assert LinkMonitor().stats() == LinkStats(0.0, 0.0, 0.0, 0)


def test_round_trip_is_the_smallest_of_a_window():
    monitor = LinkMonitor()
    for seconds in (0.09, 0.05, 0.2):
        monitor.observe_rtt(seconds)
    assert monitor.stats().rtt_s == 0.05
    for _ in range(LinkMonitor.RTT_WINDOW - 2):
        monitor.observe_rtt(0.3)
    assert monitor.stats().rtt_s == 0.05  # still the oldest but one in the window
    monitor.observe_rtt(0.3)
    monitor.observe_rtt(0.3)
    assert monitor.stats().rtt_s == 0.3  # the route has changed


def test_goodput_is_bits_per_second_and_by_direction():
    monitor = LinkMonitor()
    monitor.observe_transfer("up", 1_000_000, 2.0)
    monitor.observe_transfer("down", 1_000_000, 0.5)
    assert monitor.stats() == LinkStats(0.0, 4e6, 16e6, 2)


def test_one_odd_transfer_leaves_goodput_alone_and_a_lasting_change_moves_it():
    monitor = LinkMonitor()
    for _ in range(5):
        monitor.observe_transfer("up", 1_000_000, 1.0)
    monitor.observe_transfer("up", 1_000_000, 100.0)
    assert monitor.stats().goodput_up_bps == pytest.approx(8e6)
    for _ in range(20):
        monitor.observe_transfer("up", 1_000_000, 4.0)
    assert monitor.stats().goodput_up_bps == pytest.approx(2e6, rel=0.02)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 10**9), st.floats(1e-3, 1e3)), min_size=1, max_size=40))
def test_goodput_lies_between_the_slowest_and_the_fastest_transfer(transfers: list[tuple[int, float]]):
    monitor = LinkMonitor()
    for size, seconds in transfers:
        monitor.observe_transfer("down", size, seconds)
    rates = [8 * size / seconds for size, seconds in transfers]
    assert min(rates) * 0.999_999 <= monitor.stats().goodput_down_bps <= max(rates) * 1.000_001
    assert monitor.stats().transfers == len(transfers)


@pytest.mark.parametrize(("size", "seconds"), [(-1, 1.0), (1, -1.0)])
def test_impossible_transfers_are_refused(size: int, seconds: float):
    with pytest.raises(ValueError, match="takes time"):
        LinkMonitor().observe_transfer("up", size, seconds)


def test_a_transfer_too_quick_for_the_clock_tells_nothing():
    monitor = LinkMonitor()
    monitor.observe_transfer("down", 1000, 0.0)
    assert monitor.stats().transfers == 0


def test_threads_lose_no_observation():
    monitor = LinkMonitor()

    def observe() -> None:
        for _ in range(500):
            monitor.observe_transfer("up", 10, 1.0)

    threads = [threading.Thread(target=observe) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert monitor.stats().transfers == 2000


# --- congestion control -------------------------------------------------------------------------------------------

BBR = "bbr" in Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()


def without_bbr(kind: type[socket.socket] = socket.socket) -> socket.socket:
    made = kind()
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    return made


def test_connections_that_the_meter_sees_prefer_bbr_and_no_others():
    with without_bbr() as listener, without_bbr() as here, without_bbr() as elsewhere, without_bbr() as other:
        for server in (listener, other):
            server.bind(("127.0.0.1", 0))
            server.listen()
        here.connect(listener.getsockname())
        elsewhere.connect(other.getsockname())
        meter = WireMeter(*listener.getsockname())
        meter.sample()
        assert congestion(here) == ("bbr" if BBR else "reno")
        assert congestion(elsewhere) == "reno"
        here.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")  # somebody's choice
        meter.sample()
        assert congestion(here) == "reno", "it is set once"


def test_a_listener_hands_it_down():
    with without_bbr() as listener, without_bbr() as other, socket.socket() as client:
        for server in (listener, other):
            server.bind(("127.0.0.1", 0))
            server.listen()
        listeners_prefer_bbr(listener.getsockname()[1])
        assert congestion(other) == "reno"
        client.connect(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:
            assert congestion(accepted) == ("bbr" if BBR else "reno")
