"""Deltas on their way in: chunks of each that have come, over whichever connection, in whichever session."""

from __future__ import annotations

from dataclasses import dataclass

from nebula.clock import Clock, Condition
from nebula.errors import PacketError
from nebula.proto.v1.run_pb2 import Manifest, PushHead
from nebula.wan.chunks import CHUNK_BYTES, Assembly


@dataclass(frozen=True)
class Upload:
    """`turn`: of calls that find it whole; the first one delivers it, and the others hear what became of it."""

    manifest: Manifest
    state: Assembly
    turn: Condition


class Uploads:
    """One for each cluster and fragment: a newer delta takes the place of one that was never finished. So memory is
    bounded by what all clusters may send at once."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._open: dict[tuple[str, str], Upload] = {}
        self._lock = clock.condition()

    def open(self, cluster: str, head: PushHead, limit: int) -> Upload:
        """The delta that a head describes, with what has come of it. Raises PacketError if it is of more than `limit`
        bytes, or contradicts itself."""
        if head.payload.bytes > limit:
            raise PacketError(
                f"a delta of fragment {head.fragment} has at most {limit} bytes, not {head.payload.bytes}"
            )
        with self._lock:
            found = self._open.get((cluster, head.fragment))
            if found is None or found.manifest != head.payload:
                what = f"the delta of {cluster} for fragment {head.fragment!r}"
                found = Upload(head.payload, Assembly(head.payload, CHUNK_BYTES, what), self._clock.condition())
                self._open[cluster, head.fragment] = found
            return found

    def close(self, cluster: str, head: PushHead) -> None:
        """It was delivered, or nobody wants it any more; another one of the same fragment stays."""
        with self._lock:
            found = self._open.get((cluster, head.fragment))
            if found is not None and found.manifest == head.payload:
                del self._open[cluster, head.fragment]
