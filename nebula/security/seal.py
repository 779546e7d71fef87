"""Sealed frames: AES-256-GCM over chunks of a message, each bound to its place in it.

A message of n frames takes n consecutive counters, so `counter − index` names the message. Every field that gives a
frame its meaning is authenticated; with the ordering rules below, that rejects frames which were altered, cut off,
reordered, repeated, moved to another message, session or direction, or offered as something else than they are.

    nonce            direction (4 bytes) · counter (8 bytes); one key per direction and epoch, so none repeats
    associated data  protocol, agreement, source, destination, epoch, counter, index, last, context, length-prefixed
"""

from __future__ import annotations

import io
import struct
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from threading import Lock

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from nebula.errors import FrameError, SessionError
from nebula.proto.v1.packet_pb2 import Frame
from nebula.types import COORDINATOR

PROTOCOL = b"nebula frame v1"
FRAME_BYTES = 1 << 20
"""Plaintext bytes in every frame of a message but its last."""
MAX_FRAMES = 1 << 32
"""Frames per key: the bound NIST SP 800-38D §8.3 sets for one GCM key."""
REPLAY_WINDOW = 1 << 14
"""Messages remembered one by one; what is older than all of them is refused."""

_TAG_BYTES = 16


def length_prefixed(*fields: bytes) -> bytes:
    """Join fields so that no two lists of fields give the same bytes."""
    return b"".join(part for field in fields for part in (struct.pack(">Q", len(field)), field))


class SealedChannel:
    """One direction of one session, at one of its ends: `seals` at the source, not at the destination. Any number of
    threads may seal and open messages in parallel. Only the cipher is kept, never the bytes of the key."""

    def __init__(
        self,
        key: bytes,
        *,
        source: str,
        destination: str,
        epoch: int,
        agreement: str,
        seals: bool,
        frame_bytes: int = FRAME_BYTES,
    ) -> None:
        self.source, self.destination, self.epoch = source, destination, epoch
        self._seals, self._frame_bytes = seals, frame_bytes
        self._cipher = AESGCM(key)
        self._direction = b"up\0\0" if destination == COORDINATOR else b"down"
        parties = (agreement.encode(), source.encode(), destination.encode())
        self._link = length_prefixed(PROTOCOL, *parties, struct.pack(">Q", epoch))
        self._next = 0
        self._lock = Lock()
        self._accepted = _Accepted()

    def __repr__(self) -> str:
        return f"SealedChannel({self.source} → {self.destination}, epoch {self.epoch})"

    def seal(self, message: bytes | memoryview, *, context: bytes) -> Iterator[Frame]:
        """Encrypt a message frame by frame, as they are asked for; `message` must not change meanwhile. Sending it a
        second time means sealing it again. Raises SessionError when the key has sealed all the frames it may."""
        assert self._seals, "sealing at the destination would repeat the source's nonces"
        view = memoryview(message).cast("B")
        size = self._frame_bytes
        count = max(1, -(-len(view) // size))
        first = self._reserve(count)
        for index in range(count):
            counter, last = first + index, index == count - 1
            chunk = view[index * size : (index + 1) * size]
            ciphertext = self._cipher.encrypt(self._nonce(counter), chunk, self._data(counter, index, last, context))
            yield Frame(
                source=self.source, epoch=self.epoch, counter=counter, index=index, last=last, ciphertext=ciphertext
            )

    def open(self, frames: Iterable[Frame], *, context: bytes, limit: int) -> bytes:
        """Decrypt exactly one message of at most `limit` bytes, leaving what follows it in the iterator.

        A message counts as received from its first frame on: one that broke off is not accepted again.
        Raises FrameError with reason auth, replay, size, order or schema.
        """
        plain = io.BytesIO()
        first = 0
        for index, frame in enumerate(frames):
            self._check_place(frame, index, first)
            ciphertext = frame.ciphertext
            self._check_size(frame, len(ciphertext) - _TAG_BYTES, limit - plain.tell())
            data = self._data(frame.counter, frame.index, frame.last, context)
            try:
                chunk = self._cipher.decrypt(self._nonce(frame.counter), ciphertext, data)
            except InvalidTag as error:
                raise FrameError(
                    "auth", f"frame {index} from {self.source} was altered or is not part of {context!r}"
                ) from error
            if index == 0:
                first = frame.counter
                if not self._accepted.add(first):
                    raise FrameError("replay", f"message {first} from {self.source} was received before")
            plain.write(chunk)
            if frame.last:
                return plain.getvalue()
        raise FrameError("order", f"a message from {self.source} broke off before its last frame")

    def _reserve(self, count: int) -> int:
        with self._lock:
            first = self._next
            if first + count > MAX_FRAMES:
                raise SessionError(
                    f"{self!r} has sealed {first} frames and its key may seal no more than {MAX_FRAMES}",
                    hint="join again: a new epoch has new keys",
                )
            self._next = first + count
            return first

    def _check_place(self, frame: Frame, index: int, first: int) -> None:
        if frame.source != self.source:
            raise FrameError("auth", f"a frame on {self!r} names {frame.source!r} as its source")
        if frame.epoch != self.epoch:
            reason = "replay" if frame.epoch < self.epoch else "auth"
            raise FrameError(reason, f"a frame of epoch {frame.epoch} came on {self!r}")
        if frame.index != index or (index > 0 and frame.counter != first + index):
            raise FrameError(
                "order",
                f"frame {frame.index} of message {frame.counter - frame.index} came where frame {index} was due",
            )

    def _check_size(self, frame: Frame, size: int, room: int) -> None:
        if size < 0 or (size == 0 and not (frame.index == 0 and frame.last)):
            raise FrameError("schema", f"frame {frame.index} from {self.source} is empty")
        if size > self._frame_bytes:
            raise FrameError("size", f"frame {frame.index} from {self.source} exceeds {self._frame_bytes} bytes")
        if size > room:
            raise FrameError("size", f"a message from {self.source} exceeds its limit by {size - room} bytes")

    def _nonce(self, counter: int) -> bytes:
        return self._direction + struct.pack(">Q", counter)

    def _data(self, counter: int, index: int, last: bool, context: bytes) -> bytes:
        return self._link + length_prefixed(struct.pack(">QI?", counter, index, last), context)


class _Accepted:
    """First counters of accepted messages. Parallel messages arrive out of order, hence not just the highest one; the
    lowest are forgotten, and everything up to them is refused, so that memory stays bounded."""

    def __init__(self) -> None:
        self._counters: list[int] = []
        self._floor = -1
        self._lock = Lock()

    def add(self, counter: int) -> bool:
        """False if the counter was added before, or is too old to tell."""
        with self._lock:
            at = bisect_left(self._counters, counter)
            if counter <= self._floor or self._counters[at : at + 1] == [counter]:
                return False
            self._counters.insert(at, counter)
            if len(self._counters) > REPLAY_WINDOW:
                self._floor = self._counters.pop(0)
            return True
