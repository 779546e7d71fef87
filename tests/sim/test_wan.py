"""The emulated link: its timing on a virtual clock, its relay over real sockets. Nothing here reads a wall clock."""

from __future__ import annotations

import asyncio
import math
import random
import socket
import struct
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula.config import Link
from nebula.errors import PreflightError
from nebula.sim.line import SEGMENT
from nebula.sim.pipe import Pipe
from nebula.sim.wan import Line, Relay, Shape, Target, Traffic, running

FAST = Link(rate_mbps=1e5, rtt_ms=0.0)

# --- the line, on a virtual clock ---------------------------------------------------------------------------------

shapes = st.builds(
    Shape, rate=st.floats(1e3, 1e9), rtt=st.floats(0.0, 1.0), loss=st.one_of(st.just(0.0), st.floats(0.0, 0.5))
)
sends = st.lists(st.tuples(st.floats(0.0, 0.5), st.integers(1, 200_000)), min_size=1, max_size=30)


def deliveries(shape: Shape, plan: list[tuple[float, int]], seed: int = 0) -> list[tuple[float, int, float]]:
    """(handed over, size, delivered) of each chunk of a plan of (pause before it, size)."""
    line, now, out = Line(shape, random.Random(seed)), 0.0, []
    for gap, size in plan:
        now += gap
        out.append((now, size, line.send(now, size)))
    return out


def test_shape_converts_megabits_and_milliseconds():
    shape = Shape.of(Link(rate_mbps=80.0, rtt_ms=50.0, loss=0.25))
    assert (shape.rate, shape.rtt, shape.loss) == (1e7, 0.05, 0.25)
    assert shape.grain == 50_000
    assert shape.window == 500_000 + 4 * 50_000


def test_an_idle_line_takes_serialisation_plus_half_a_round_trip():
    line = Line(Shape(rate=1000.0, rtt=0.2, loss=0.0), random.Random(0))
    assert line.send(10.0, 500) == pytest.approx(10.6)
    assert line.send(10.0, 500) == pytest.approx(11.1)  # waits for the first
    assert line.send(20.0, 0) == pytest.approx(20.1)  # idle again


@settings(deadline=None, max_examples=60)
@given(shapes, sends)
def test_deliveries_are_in_order_and_never_beat_the_rate_or_the_distance(shape: Shape, plan: list[tuple[float, int]]):
    done = deliveries(shape, plan)
    arrivals = [at for _, _, at in done]
    assert arrivals == sorted(arrivals)
    for first in range(len(done)):
        carried = 0
        for start, size, at in done[first:]:
            carried += size
            assert at >= start + shape.rtt / 2
            assert at >= done[first][0] + shape.rtt / 2 + 0.999_999 * carried / shape.rate


@settings(deadline=None, max_examples=60)
@given(shapes, sends)
def test_without_loss_the_line_is_work_conserving(shape: Shape, plan: list[tuple[float, int]]):
    free = 0.0
    for start, size, at in deliveries(Shape(shape.rate, shape.rtt, 0.0), plan):
        free = max(free, start) + size / shape.rate
        assert at == pytest.approx(free + shape.rtt / 2)


def test_losses_come_as_often_as_asked_and_the_same_for_the_same_seed():
    shape, count = Shape(rate=1e9, rtt=0.1, loss=0.05), 20_000
    plan = [(10.0, SEGMENT)] * count  # far apart: every segment has the line to itself
    late = [round((at - start - 0.05) / 0.1) for start, _, at in deliveries(shape, plan, seed=3)]
    spread = 5 * math.sqrt(count * 0.05 * 0.95)
    assert abs(sum(n >= 1 for n in late) - count * 0.05) < spread
    assert abs(sum(n >= 2 for n in late) - count * 0.05**2) < 5 * math.sqrt(count * 0.05**2)
    assert deliveries(shape, plan, seed=3) == deliveries(shape, plan, seed=3)
    assert deliveries(shape, plan, seed=3) != deliveries(shape, plan, seed=4)


def test_larger_chunks_are_as_likely_to_stall_as_their_segments_together():
    shape, count = Shape(rate=1e9, rtt=0.1, loss=0.01), 5_000
    stalled = sum(at - start > 0.1 for start, _, at in deliveries(shape, [(10.0, 10 * SEGMENT)] * count))
    share = 1 - 0.99**10
    assert abs(stalled - count * share) < 5 * math.sqrt(count * share)


class Scripted(random.Random):
    """Loses exactly the segments it is told to."""

    def __init__(self, draws: list[float]) -> None:
        super().__init__(0)
        self.draws = draws

    def random(self) -> float:
        return self.draws.pop(0)


def test_a_lost_segment_holds_up_what_is_behind_it_for_one_round_trip():
    line = Line(Shape(rate=SEGMENT * 1000.0, rtt=1.0, loss=0.5), Scripted([0.9, 0.1, 0.9, 0.9, 0.9]))
    assert line.send(0.0, SEGMENT) == pytest.approx(0.501)
    assert line.send(0.0, SEGMENT) == pytest.approx(1.502)  # lost once
    assert line.send(0.0, SEGMENT) == pytest.approx(1.502)  # there in time, delivered behind the lost one
    assert line.send(2.0, SEGMENT) == pytest.approx(2.501)  # the stall is over


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time stands still until told to move on; `advance` runs what falls due on the way, each at its own time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.timers: list[asyncio.TimerHandle] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when, callback, *args, context=None):
        self.timers.append(asyncio.TimerHandle(when, callback, args, self, context))
        return self.timers[-1]

    def advance(self, until: float) -> None:
        while due := [timer for timer in self.timers if timer.when() <= until and not timer.cancelled()]:
            first = min(due, key=asyncio.TimerHandle.when)
            self.timers.remove(first)
            self.now = first.when()
            first._run()
        self.now = until


class Source:
    """Stands in for an end: notes when its chunks arrive."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.loop = loop
        self.arrivals: list[tuple[float, bytes]] = []

    def arrived(self, chunk: bytes) -> None:
        self.arrivals.append((round(self.loop.now, 6), chunk))


@contextmanager
def pipe(shape: Shape) -> Iterator[tuple[Pipe, VirtualLoop, Source]]:
    loop = VirtualLoop()
    try:
        yield Pipe(shape, random.Random(0), loop), loop, Source(loop)
    finally:
        loop.close()


def test_a_pipe_delivers_each_chunk_when_the_line_says():
    with pipe(Shape(rate=100.0, rtt=2.0, loss=0.0)) as (line, loop, source):
        line.push(source, b"a" * 100)
        line.push(source, b"b" * 50)
        loop.advance(1.9)
        assert source.arrivals == []
        loop.advance(10.0)
        assert source.arrivals == [(2.0, b"a" * 100), (2.5, b"b" * 50)]
        line.push(source, b"c")
        loop.advance(20.0)
        assert source.arrivals[2:] == [(11.01, b"c")]


def test_a_held_pipe_keeps_what_is_on_the_line():
    with pipe(Shape(rate=100.0, rtt=2.0, loss=0.0)) as (line, loop, source):
        line.push(source, b"a" * 100)
        line.hold(True)
        line.push(source, b"b" * 100)
        loop.advance(50.0)
        assert source.arrivals == []
        line.hold(False)
        loop.advance(60.0)
        assert [chunk[:1] for _, chunk in source.arrivals] == [b"a", b"b"]


# --- the relay, over real sockets ---------------------------------------------------------------------------------


def receive(connection: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes, or fewer at the end of the stream."""
    data = bytearray()
    while len(data) < size and (piece := connection.recv(min(size - len(data), 1 << 20))):
        data += piece
    return bytes(data)


@contextmanager
def relayed(link: Link = FAST) -> Iterator[tuple[Relay, socket.socket]]:
    """A relay and the listening socket that is its target."""
    with socket.create_server(("127.0.0.1", 0)) as target:
        target.settimeout(30)
        with running({"link": (link, target.getsockname())}) as relays:
            yield relays["link"], target


@contextmanager
def connection(relay: Relay, target: socket.socket) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of one connection through the relay."""
    with connect(relay) as client:
        server, _ = target.accept()
        with server:
            server.settimeout(30)
            yield client, server


def connect(relay: Relay) -> socket.socket:
    return socket.create_connection(("127.0.0.1", relay.port), timeout=30)


def is_closed(end: socket.socket) -> bool:
    try:
        return end.recv(1) == b""
    except ConnectionResetError:
        return True


chunkings = st.lists(st.integers(1, 120_000), min_size=1, max_size=6)


@settings(deadline=None, max_examples=12)
@given(up=chunkings, down=chunkings, seed=st.integers(0, 99))
def test_both_directions_arrive_whole_and_are_counted(up: list[int], down: list[int], seed: int):
    rng = random.Random(seed)
    messages = [[rng.randbytes(size) for size in sizes] for sizes in (up, down)]

    def talk(end: socket.socket, chunks: list[bytes], expected: int) -> bytes:
        def say() -> None:
            for chunk in chunks:
                end.sendall(chunk)

        speaker = threading.Thread(target=say)
        speaker.start()
        heard = receive(end, expected)
        speaker.join()
        return heard

    with (
        relayed(Link(rate_mbps=2000.0, rtt_ms=1.0, loss=0.01)) as (relay, target),
        connection(relay, target) as (client, server),
        ThreadPoolExecutor(2) as pool,
    ):
        heard_above = pool.submit(talk, server, messages[1], sum(up))
        heard_below = pool.submit(talk, client, messages[0], sum(down))
        assert heard_above.result() == b"".join(messages[0])
        assert heard_below.result() == b"".join(messages[1])
        assert relay.traffic == Traffic(up_bytes=sum(up), down_bytes=sum(down), connections=1)


def test_connections_share_a_relay_without_mixing():
    with relayed() as (relay, target):
        with connection(relay, target) as (a, above_a), connection(relay, target) as (b, above_b):
            a.sendall(b"from a")
            b.sendall(b"from b")
            assert (receive(above_a, 6), receive(above_b, 6)) == (b"from a", b"from b")
            above_b.sendall(b"to b")
            above_a.sendall(b"to a")
            assert (receive(a, 4), receive(b, 4)) == (b"to a", b"to b")
        assert relay.traffic.connections == 2


def test_half_close_lets_the_answer_through_and_then_ends_both_sides():
    with relayed() as (relay, target), connection(relay, target) as (client, server):
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        assert receive(server, 100) == b"question"  # ends at the client's end of file
        server.sendall(b"answer")
        server.shutdown(socket.SHUT_WR)
        assert receive(client, 100) == b"answer"


@pytest.mark.parametrize("who", ["client", "server"])
def test_closing_one_side_closes_the_other_after_its_last_byte(who: str):
    with relayed() as (relay, target), connection(relay, target) as ends:
        leaver, stayer = ends if who == "client" else ends[::-1]
        leaver.sendall(b"x" * 300_000)
        leaver.close()
        assert receive(stayer, 300_001) == b"x" * 300_000


def test_half_closing_a_peer_that_is_gone_is_no_error_and_holds_up_nobody(caplog):
    with relayed() as (relay, target):
        with connection(relay, target) as (client, server):
            client.close()
            assert receive(server, 1) == b""
            server.sendall(b"to nobody")  # which the client's kernel answers with a reset
            server.shutdown(socket.SHUT_WR)
            rounds_of_the_loop(relay, 5)
        with connection(relay, target) as (client, server):
            server.sendall(b"after")
            assert receive(client, 5) == b"after"
    assert caplog.records == []  # where the event loop reports what no one caught


def test_a_connection_that_is_reset_ends_on_the_other_side():
    with relayed() as (relay, target), connection(relay, target) as (client, server):
        server.sendall(b"unread")
        assert receive(client, 6) == b"unread"
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        assert is_closed(server)


def test_a_receiver_that_does_not_read_stops_the_sender():
    """Everything between the two ends, the kernel's buffers included, holds a bounded number of bytes."""
    link = Link(rate_mbps=800.0, rtt_ms=1.0)
    window, message = Shape.of(link).window, b"x" * 32_000_000
    with socket.socket() as target:
        target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        target.bind(("127.0.0.1", 0))
        target.listen()
        target.settimeout(30)
        relay = StoppedWhenFull(link, target.getsockname())
        with relay.running(), connection(relay, target) as (client, server), ThreadPoolExecutor(1) as pool:
            sending = pool.submit(client.sendall, message)
            assert relay.full.wait(30)
            assert relay.largest_backlog <= 2 * window
            assert relay.traffic.up_bytes < len(message)
            assert not sending.done()
            assert receive(server, len(message)) == message  # reading again sets everything moving again
            assert relay.largest_backlog <= 2 * window
            sending.result()


class StoppedWhenFull(Relay):
    """Notices when its accepted end stops reading although nothing on the line will wake it: the receiver is full."""

    def __init__(self, link: Link, target: Target) -> None:
        super().__init__(link, target)
        self.full = threading.Event()
        self.largest_backlog = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        asyncio.run_coroutine_threadsafe(self.start(), loop).result()
        try:
            yield
        finally:
            asyncio.run_coroutine_threadsafe(self.close(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    def _accept(self):
        client = super()._accept()
        throttle = client.throttle

        def watched() -> None:
            throttle()
            out = client._out()
            waiting = out.get_write_buffer_size() if out is not None else 0
            self.largest_backlog = max(self.largest_backlog, client._under_way + waiting)
            if waiting and not client._under_way and not client.transport.is_reading():
                self.full.set()

        client.throttle = watched  # type: ignore[method-assign]
        return client


def test_cut_ends_connections_and_new_ones_work():
    with relayed() as (relay, target):
        with connection(relay, target) as (client, server):
            client.sendall(b"before")
            assert receive(server, 6) == b"before"
            relay.cut()
            assert is_closed(client)
            assert is_closed(server)
        with connection(relay, target) as (client, server):
            client.sendall(b"after")
            assert receive(server, 5) == b"after"


def test_nothing_passes_while_paused_and_all_of_it_afterwards():
    with relayed() as (relay, target), connection(relay, target) as (client, server):
        client.sendall(b"one")
        assert receive(server, 3) == b"one"
        relay.pause()
        client.sendall(b"two")
        server.sendall(b"three")
        late = connect(relay)
        late.sendall(b"four")
        for quiet in (client, server, target):
            quiet.setblocking(False)
        rounds_of_the_loop(relay, 50)
        for quiet in (client, server):
            with pytest.raises(BlockingIOError):
                quiet.recv(1)
        with pytest.raises(BlockingIOError):
            target.accept()
        assert relay.traffic.up_bytes == 3
        for loud in (client, server, target):
            loud.settimeout(30)
        relay.resume()
        assert receive(server, 3) == b"two"
        assert receive(client, 5) == b"three"
        other, _ = target.accept()
        with late, other:
            assert receive(other, 4) == b"four"


def rounds_of_the_loop(relay: Relay, count: int) -> None:
    """Let the relay's event loop look at its sockets this many times."""
    for _ in range(count):
        relay.recorded("up")


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("at", [0, 1, 149_999, 299_999])
def test_corrupt_flips_exactly_one_bit(direction: str, at: int):
    message = random.Random(at).randbytes(300_000)
    with relayed() as (relay, target), connection(relay, target) as (client, server):
        sender, receiver = (client, server) if direction == "up" else (server, client)
        sender.sendall(b"intact")
        assert receive(receiver, 6) == b"intact"
        relay.corrupt("up" if direction == "up" else "down", at)
        heard = send_and_receive(sender, receiver, message)
        assert [i for i, (a, b) in enumerate(zip(message, heard, strict=True)) if a != b] == [at]
        assert (message[at] ^ heard[at]).bit_count() == 1
        assert send_and_receive(sender, receiver, message) == message


def send_and_receive(sender: socket.socket, receiver: socket.socket, message: bytes) -> bytes:
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(sender.sendall, message)
        heard = receive(receiver, len(message))
        sending.result()
    return heard


def test_record_keeps_the_first_bytes_of_each_direction():
    with relayed() as (relay, target), connection(relay, target) as (client, server):
        assert send_and_receive(client, server, b"unseen") == b"unseen"
        relay.record(10)
        for part in (b"hello ", b"world, hello"):
            assert send_and_receive(client, server, part) == part
        assert send_and_receive(server, client, b"hi") == b"hi"
        assert relay.recorded("up") == b"hello worl"
        assert relay.recorded("down") == b"hi"
        relay.record(3)
        assert relay.recorded("up") == b""


def test_a_target_that_is_down_closes_the_client_and_one_that_is_back_serves_it():
    with socket.create_server(("127.0.0.1", 0)) as first:
        address = first.getsockname()
        with running({"link": (FAST, address)}) as relays:
            relay = relays["link"]
            with connection(relay, first) as (client, server):
                first.close()
                server.close()
                assert is_closed(client)
            with connect(relay) as client:
                assert is_closed(client)
            with socket.create_server(address) as second:
                second.settimeout(30)
                with connection(relay, second) as (client, server):
                    server.sendall(b"back")
                    assert receive(client, 4) == b"back"
            assert relay.traffic.connections == 3


def test_a_target_whose_name_does_not_resolve_closes_the_client():
    with running({"link": (FAST, ("nowhere.invalid", 1))}) as relays, connect(relays["link"]) as client:
        assert is_closed(client)


def test_several_relays_share_a_thread_and_leave_nothing_behind():
    before = threading.active_count()
    with warnings.catch_warnings(), socket.create_server(("127.0.0.1", 0)) as target:
        warnings.simplefilter("error")
        address = target.getsockname()
        with running({"north": (FAST, address), "south": (FAST, address)}) as relays:
            assert threading.active_count() == before + 1
            assert relays["north"].port != relays["south"].port
            clients = [connect(relay) for relay in relays.values()]
            servers = [target.accept()[0] for _ in clients]
        assert threading.active_count() == before
        for end in (*clients, *servers):
            assert is_closed(end)
            end.close()
        with pytest.raises(ConnectionRefusedError):
            connect(relays["north"])


def test_an_error_inside_the_context_still_ends_the_relays():
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), running({"link": (FAST, ("127.0.0.1", 1))}):
        raise ZeroDivisionError
    assert threading.active_count() == before


def test_losses_follow_the_seed_and_differ_by_direction(monkeypatch: pytest.MonkeyPatch):
    def draws(seed: int) -> list[float]:
        seen: list[float] = []

        def spy(shape: Shape, rng: random.Random, loop: asyncio.AbstractEventLoop) -> Pipe:
            seen.append(rng.random())
            return Pipe(shape, rng, loop)

        with monkeypatch.context() as patch:
            patch.setattr("nebula.sim.wan.Pipe", spy)
            with running({"a": (FAST, ("127.0.0.1", 1)), "b": (FAST, ("127.0.0.1", 1))}, seed=seed):
                return seen

    assert draws(1) == draws(1)
    assert len({*draws(1), *draws(2)}) == 8  # 2 links, 2 directions, 2 seeds


def test_a_port_in_use_is_a_preflight_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        relay = Relay(FAST, ("127.0.0.1", 1), port=port)
        with pytest.raises(PreflightError, match=str(port)) as caught:
            asyncio.run(relay.start())
        assert caught.value.hint
