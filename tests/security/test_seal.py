from __future__ import annotations

import itertools
import os
import random
import tracemalloc
from array import array
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula.errors import FrameError, SessionError
from nebula.security import seal
from nebula.security.seal import FRAME_BYTES, SealedChannel, length_prefixed

FRAME = 16
KEY = bytes(range(32))


def ends(frame_bytes: int = FRAME) -> tuple[SealedChannel, SealedChannel]:
    def end(seals: bool) -> SealedChannel:
        return SealedChannel(
            KEY,
            source="north",
            destination="coordinator",
            epoch=3,
            agreement="sha256:1",
            seals=seals,
            frame_bytes=frame_bytes,
        )

    return end(True), end(False)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 5), st.integers(-1, 1), st.randoms(use_true_random=False), st.binary(max_size=40))
def test_round_trip_around_frame_borders(frames, off, rng, context):
    message = rng.randbytes(max(0, frames * FRAME + off))
    sender, receiver = ends()
    sealed = list(sender.seal(message, context=context))
    assert len(sealed) == max(1, -(-len(message) // FRAME))
    assert [frame.index for frame in sealed] == list(range(len(sealed)))
    assert [frame.last for frame in sealed] == [False] * (len(sealed) - 1) + [True]
    assert all(len(frame.ciphertext) <= FRAME + 16 for frame in sealed)
    assert receiver.open(sealed, context=context, limit=len(message)) == message


@pytest.mark.parametrize("size", [FRAME_BYTES - 1, FRAME_BYTES, FRAME_BYTES + 1])
def test_round_trip_around_the_default_frame(size):
    sender, receiver = ends(FRAME_BYTES)
    message = os.urandom(size)
    sealed = list(sender.seal(memoryview(message), context=b"c"))
    assert len(sealed) == -(-size // FRAME_BYTES)
    assert receiver.open(sealed, context=b"c", limit=size) == message


def test_views_of_any_element_type_are_sealed_as_bytes():
    sender, receiver = ends()
    values = array("i", range(100))
    opened = receiver.open(sender.seal(memoryview(values), context=b""), context=b"", limit=1000)
    assert opened == values.tobytes()


def test_ciphertexts_show_nothing_and_never_repeat():
    sender, _ = ends()
    message = bytes(FRAME)
    frames = [frame for _ in range(50) for frame in sender.seal(message * 2, context=b"")]
    assert len({frame.ciphertext for frame in frames}) == 100
    assert not any(message[:8] in frame.ciphertext for frame in frames)


def test_the_two_directions_never_share_a_nonce():
    """Even if they shared a key: otherwise equal keystreams would cancel out."""
    up, _ = ends()
    down = SealedChannel(KEY, source="coordinator", destination="north", epoch=3, agreement="sha256:1", seals=True)
    (there,), (back,) = (channel.seal(bytes(FRAME), context=b"") for channel in (up, down))
    assert there.counter == back.counter
    assert there.ciphertext[:FRAME] != back.ciphertext[:FRAME]


def test_open_takes_one_message_and_leaves_the_next():
    sender, receiver = ends()
    head, body = b"h" * 20, b"b" * 50
    stream = itertools.chain(sender.seal(head, context=b"head"), sender.seal(body, context=b"body"))
    assert receiver.open(stream, context=b"head", limit=20) == head
    assert receiver.open(stream, context=b"body", limit=50) == body
    assert list(stream) == []


def test_sealing_and_opening_are_lazy():
    """Neither end holds a second copy of a message."""
    size = 16 * FRAME_BYTES
    message = bytes(size)
    sender, receiver = ends(FRAME_BYTES)
    tracemalloc.start()
    try:
        for _ in sender.seal(message, context=b""):
            pass
        assert tracemalloc.get_traced_memory()[1] < 4 * FRAME_BYTES
        opened = receiver.open(sender.seal(message, context=b""), context=b"", limit=size)
        assert tracemalloc.get_traced_memory()[1] < size * 1.5
    finally:
        tracemalloc.stop()
    assert opened == message


def test_interleaved_messages_do_not_share_counters():
    sender, receiver = ends()
    first, second = (sender.seal(text * 40, context=b"") for text in (b"a", b"b"))
    frames = [frame for pair in zip(first, second, strict=True) for frame in pair]
    assert len({frame.counter for frame in frames}) == len(frames) == 6
    assert receiver.open(frames[1::2], context=b"", limit=100) == b"b" * 40
    assert receiver.open(frames[0::2], context=b"", limit=100) == b"a" * 40


def test_threads_seal_and_open_in_parallel_and_in_any_order():
    sender, receiver = ends()
    messages = [bytes([n]) * (n * 7) for n in range(100)]
    with ThreadPoolExecutor(8) as pool:
        sealed = list(pool.map(lambda m: list(sender.seal(m, context=b"")), messages))
        counters = [frame.counter for frames in sealed for frame in frames]
        assert len(set(counters)) == len(counters)
        order = random.Random(0).sample(range(100), 100)
        opened = list(pool.map(lambda n: receiver.open(sealed[n], context=b"", limit=1000), order))
    assert opened == [messages[n] for n in order]


def test_of_many_copies_in_parallel_one_is_accepted():
    sender, receiver = ends()
    copies = [list(sender.seal(bytes([n]) * 40, context=b"")) for n in range(20)] * 4

    def accepted(frames):
        try:
            return receiver.open(frames, context=b"", limit=100)[:1]
        except FrameError as error:
            return error.reason

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(accepted, copies))
    assert results.count("replay") == 60
    assert sorted(r for r in results if r != "replay") == [bytes([n]) for n in range(20)]


def test_replay_memory_is_bounded_and_forgets_nothing_it_would_accept(monkeypatch):
    monkeypatch.setattr(seal, "REPLAY_WINDOW", 8)
    sender, receiver = ends()
    sealed = [list(sender.seal(b"m" * 20, context=b"")) for _ in range(50)]
    late = sealed.pop(30)
    for frames in sealed[:34]:
        receiver.open(frames, context=b"", limit=20)
    assert receiver.open(late, context=b"", limit=20) == b"m" * 20, "out of order, within the window"
    for frames in sealed[34:]:
        receiver.open(frames, context=b"", limit=20)
    assert len(receiver._accepted._counters) == 8
    for frames in [late, *sealed]:
        with pytest.raises(FrameError) as caught:
            receiver.open(frames, context=b"", limit=20)
        assert caught.value.reason == "replay"


@pytest.mark.parametrize("size", [40, FRAME, 1])
def test_the_limit_stops_a_message_before_memory_grows(size):
    sender, receiver = ends()
    drawn = []
    frames = (drawn.append(frame) or frame for frame in sender.seal(b"m" * size, context=b""))
    with pytest.raises(FrameError, match="limit") as caught:
        receiver.open(frames, context=b"", limit=size - 1)
    assert caught.value.reason == "size"
    drawn.clear()
    long = (drawn.append(frame) or frame for frame in sender.seal(bytes(100 * FRAME), context=b""))
    with pytest.raises(FrameError):
        receiver.open(long, context=b"", limit=2 * FRAME)
    assert len(drawn) == 3


def test_a_key_is_used_up(monkeypatch):
    monkeypatch.setattr(seal, "MAX_FRAMES", 4)
    sender, receiver = ends()
    assert receiver.open(sender.seal(b"m" * 3 * FRAME, context=b""), context=b"", limit=100)
    with pytest.raises(SessionError, match="may seal no more than 4") as caught:
        list(sender.seal(b"m" * 2 * FRAME, context=b""))
    assert "join again" in caught.value.hint
    (frame,) = sender.seal(b"m", context=b"")
    assert frame.counter == 3
    with pytest.raises(SessionError):
        list(sender.seal(b"", context=b""))


def test_the_bound_on_a_key_is_the_one_of_the_standard():
    assert seal.MAX_FRAMES == 2**32


def test_the_destination_cannot_seal_by_mistake():
    _, receiver = ends()
    with pytest.raises(AssertionError, match="nonces"):
        list(receiver.seal(b"m", context=b""))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=4), max_size=4), st.lists(st.binary(max_size=4), max_size=4))
def test_length_prefixes_keep_different_fields_apart(left, right):
    assert (length_prefixed(*left) == length_prefixed(*right)) == (left == right)
