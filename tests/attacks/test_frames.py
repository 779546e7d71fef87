"""What a hostile path, or a hostile peer without the key, can do to frames. Each attack is refused with the reason
that is counted, and leaves the channel working."""

from __future__ import annotations

import copy
import itertools

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula.errors import FrameError, SessionError
from nebula.proto.v1.packet_pb2 import Frame
from nebula.security import seal
from nebula.security.seal import SealedChannel

FRAME = 16
CONTEXT = b"push\0model\0f0\x07"
MESSAGE = bytes(range(40))
LATER = itertools.count(1000)
KEYS = {"up": b"u" * 32, "down": b"d" * 32}


def channel(
    direction: str = "up", *, seals: bool, cluster: str = "north", epoch: int = 3, agreement: str = "sha256:1"
) -> SealedChannel:
    source, destination = (cluster, "coordinator") if direction == "up" else ("coordinator", cluster)
    return SealedChannel(
        KEYS[direction],
        source=source,
        destination=destination,
        epoch=epoch,
        agreement=agreement,
        seals=seals,
        frame_bytes=FRAME,
    )


def sealed(message: bytes = MESSAGE, sender: SealedChannel | None = None) -> list[Frame]:
    return list((sender or channel(seals=True)).seal(message, context=CONTEXT))


def refused(frames, reason: str, receiver: SealedChannel | None = None, *, context: bytes = CONTEXT, limit: int = 100):
    """Assert the refusal, and that the channel still takes what is genuine."""
    receiver = receiver or channel(seals=False)
    with pytest.raises(FrameError) as caught:
        receiver.open(frames, context=context, limit=limit)
    assert caught.value.reason == reason
    assert str(caught.value)
    direction = "up" if receiver.destination == "coordinator" else "down"
    cluster = receiver.source if direction == "up" else receiver.destination
    genuine = channel(direction, seals=True, cluster=cluster, epoch=receiver.epoch)
    # Past every counter that the attacks use; senders never go back.
    genuine._reserve(next(LATER))
    assert receiver.open(genuine.seal(b"genuine", context=CONTEXT), context=CONTEXT, limit=7) == b"genuine"


def altered(frames: list[Frame], at: int, **fields) -> list[Frame]:
    frames = copy.deepcopy(frames)
    for name, value in fields.items():
        setattr(frames[at], name, value)
    return frames


def test_the_frames_that_the_attacks_start_from_are_good():
    assert channel(seals=False).open(sealed(), context=CONTEXT, limit=len(MESSAGE)) == MESSAGE


# --- altered (11, 12, 19) -----------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2),
    st.sampled_from(["source", "epoch", "counter", "index", "last", "ciphertext"]),
    st.integers(0, 63),
    st.integers(0, 7),
)
def test_any_flipped_bit_of_any_field_of_any_frame(at, field, place, bit):
    frames = sealed()
    value = getattr(frames[at], field)
    if field == "last":
        value = not value
    elif isinstance(value, int):
        value ^= 1 << (place % 32 if field == "index" else place)
    else:
        data = bytearray(value.encode() if field == "source" else value)
        data[place % len(data)] ^= 1 << (bit % 7 if field == "source" else bit)
        value = data.decode() if field == "source" else bytes(data)
    with pytest.raises(FrameError) as caught:
        channel(seals=False).open(altered(frames, at, **{field: value}), context=CONTEXT, limit=100)
    assert caught.value.reason in {"auth", "replay", "order"}


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2), st.integers(0, 500), st.integers(1, 255))
def test_any_altered_byte_of_the_encoding_changes_nothing_unseen(at, place, mask):
    frames = sealed()
    data = bytearray(frames[at].SerializeToString())
    data[place % len(data)] ^= mask
    try:
        frames[at] = Frame.FromString(bytes(data))
        opened = channel(seals=False).open(frames, context=CONTEXT, limit=100)
    except (DecodeError, FrameError):
        return
    assert opened == MESSAGE


def test_flipped_bit_in_the_tag_and_in_the_text():
    for byte in (0, -1):
        data = bytearray(sealed()[1].ciphertext)
        data[byte] ^= 1
        refused(altered(sealed(), 1, ciphertext=bytes(data)), "auth")


@pytest.mark.parametrize("size", range(FRAME + 16))
def test_truncated_ciphertext(size):
    frames = sealed()
    refused(altered(frames, 1, ciphertext=frames[1].ciphertext[:size]), "schema" if size <= 16 else "auth")


def test_extended_ciphertext():
    frames = sealed()
    refused(altered(frames, 1, ciphertext=frames[1].ciphertext + b"\0"), "size")
    refused(altered(frames, 2, ciphertext=frames[2].ciphertext + b"\0"), "auth")


def test_duplicate_frame_with_different_bytes():
    frames = sealed()
    other = altered(frames, 1, ciphertext=bytes(FRAME + 16))[1]
    refused([frames[0], frames[1], other, frames[2]], "order")
    refused([frames[0], other, frames[1], frames[2]], "auth")


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.builds(
            Frame,
            source=st.sampled_from(["north", "south", "coordinator", ""]),
            epoch=st.sampled_from([0, 3, 4, 2**64 - 1]),
            counter=st.sampled_from([0, 1, 2**32, 2**64 - 1]),
            index=st.sampled_from([0, 1, 2**32 - 1]),
            last=st.booleans(),
            ciphertext=st.binary(max_size=40),
        ),
        max_size=4,
    )
)
def test_made_up_frames_raise_nothing_but_frame_errors(frames):
    with pytest.raises(FrameError):
        channel(seals=False).open(frames, context=CONTEXT, limit=100)


# --- cut, reordered, repeated, spliced (17, 18, 20) ---------------------------------------------------------------


@pytest.mark.parametrize("kept", [kept for n in range(3) for kept in itertools.combinations(range(3), n)])
def test_missing_frames(kept):
    refused([sealed()[n] for n in kept], "order")


@pytest.mark.parametrize("order", [order for order in itertools.permutations(range(3)) if order != (0, 1, 2)])
def test_reordered_frames(order):
    refused([sealed()[n] for n in order], "order")


@pytest.mark.parametrize("order", [(0, 0, 1, 2), (0, 1, 1, 2), (0, 1, 0, 1, 2)])
def test_repeated_frames(order):
    refused([sealed()[n] for n in order], "order")


def test_truncation_hidden_by_a_forged_last():
    refused(altered(sealed()[:2], 1, last=True), "auth")


def test_frames_after_the_last_one_do_not_extend_the_message():
    sender = channel(seals=True)
    frames = sealed(sender=sender)
    more = list(sender.seal(b"more", context=b"other"))
    stream = iter(frames + more)
    receiver = channel(seals=False)
    assert receiver.open(stream, context=CONTEXT, limit=100) == MESSAGE
    assert list(stream) == more
    refused(altered(frames, 2, last=False), "auth")
    refused(altered(frames, 2, last=False) + more, "auth")


@pytest.mark.parametrize("start", [1, 2])
def test_the_tail_of_a_message_is_no_message(start):
    """Its counters fit together; only the index says that something came before."""
    tail = sealed()[start:]
    for at in range(len(tail)):
        tail = altered(tail, at, index=at)
    refused(tail, "auth")


def test_extension_by_a_later_message():
    """Drop the last frame of one message and go on with the next one's."""
    sender = channel(seals=True)
    first, second = sealed(sender=sender), sealed(sender=sender)
    refused([*first[:2], second[2]], "order")
    refused([*first[:1], *second[1:]], "order")


def test_frame_of_another_message_spliced_in():
    sender = channel(seals=True)
    first, second = sealed(sender=sender), sealed(bytes(40), sender=sender)
    for at in range(3):
        spliced = [*first[:at], second[at], *first[at + 1 :]]
        refused(spliced, "order")
        # With the numbers of the frame it replaces, it is not authentic.
        moved = altered(spliced, at, counter=first[at].counter)
        refused(moved, "auth")


# --- replayed, reflected, misdirected (5, 13 – 16) ----------------------------------------------------------------


def test_replay_in_the_same_epoch():
    frames = sealed()
    receiver = channel(seals=False)
    assert receiver.open(frames, context=CONTEXT, limit=100) == MESSAGE
    refused(frames, "replay", receiver)


def test_a_message_that_broke_off_is_not_accepted_again():
    frames = sealed()
    receiver = channel(seals=False)
    with pytest.raises(FrameError):
        receiver.open(frames[:2], context=CONTEXT, limit=100)
    refused(frames, "replay", receiver)


def test_a_forged_copy_does_not_use_up_the_genuine_message():
    frames = sealed()
    receiver = channel(seals=False)
    with pytest.raises(FrameError):
        receiver.open(altered(frames, 0, ciphertext=bytes(32)), context=CONTEXT, limit=100)
    assert receiver.open(frames, context=CONTEXT, limit=100) == MESSAGE


def test_replay_in_a_later_epoch():
    frames = sealed()
    later = channel(seals=False, epoch=4)
    refused(frames, "replay", later)
    for at in range(3):
        frames = altered(frames, at, epoch=4)
    refused(frames, "auth", later)


def test_frames_of_an_epoch_to_come():
    refused(sealed(sender=channel(seals=True, epoch=4)), "auth")


def test_reflection_to_the_sender():
    down = channel("down", seals=False)
    refused(sealed(), "auth", down)
    frames = sealed()
    for at in range(3):
        frames = altered(frames, at, source="coordinator")
    refused(frames, "auth", down)


def test_reflection_is_refused_even_under_one_key(monkeypatch):
    monkeypatch.setitem(KEYS, "down", KEYS["up"])
    frames = sealed()
    for at in range(3):
        frames = altered(frames, at, source="coordinator")
    refused(frames, "auth", channel("down", seals=False))


@pytest.mark.parametrize("rename", [False, True])
def test_frames_of_another_cluster_even_under_one_key(rename):
    frames = sealed(sender=channel(seals=True, cluster="south"))
    if rename:
        for at in range(3):
            frames = altered(frames, at, source="north")
    refused(frames, "auth")


def test_swapped_destination_even_under_one_key():
    refused(sealed(sender=channel("down", seals=True, cluster="south")), "auth", channel("down", seals=False))


def test_frames_under_another_agreement():
    refused(sealed(sender=channel(seals=True, agreement="sha256:2")), "auth")


@pytest.mark.parametrize("context", [b"", CONTEXT + b"\0", CONTEXT[:-1] + b"\x06", CONTEXT[:-1] + b"\x08"])
def test_offered_as_something_else(context):
    """A delta of round 7 presented as one of round 6 or 8, or as another message altogether."""
    refused(sealed(), "auth", context=context)


# --- too much (22, 23) --------------------------------------------------------------------------------------------


def test_a_message_beyond_its_limit():
    refused(sealed(), "size", limit=len(MESSAGE) - 1)
    refused(sealed(b"x"), "size", limit=0)


def test_an_oversized_frame_is_refused_by_its_size():
    refused([Frame(source="north", epoch=3, ciphertext=bytes(10_000), last=True)], "size", limit=1 << 20)


def test_an_endless_message_of_empty_frames():
    """From a peer that has the key: each frame is authentic, and none counts towards the limit."""
    sender = channel(seals=True)

    def endless():
        for n in itertools.count():
            text = sender._cipher.encrypt(sender._nonce(n), b"", sender._data(n, n, False, CONTEXT))
            yield Frame(source="north", epoch=3, counter=n, index=n, ciphertext=text)

    refused(endless(), "schema")


def test_an_endless_message_of_small_frames_ends_at_the_limit():
    sender = channel(seals=True)
    drawn = []

    def endless():
        for n in itertools.count():
            text = sender._cipher.encrypt(sender._nonce(n), b"x", sender._data(n, n, False, CONTEXT))
            drawn.append(n)
            yield Frame(source="north", epoch=3, counter=n, index=n, ciphertext=text)

    refused(endless(), "size", limit=10)
    assert len(drawn) == 11


def test_the_sender_refuses_to_wrap_its_counter(monkeypatch):
    monkeypatch.setattr(seal, "MAX_FRAMES", 5)
    sender = channel(seals=True)
    sealed(sender=sender)
    for _ in range(2):
        with pytest.raises(SessionError, match="no more than 5"):
            sealed(sender=sender)
