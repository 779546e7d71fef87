"""Which clusters have keys with the coordinator, and what a call in such a session begins with."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TypeVar

from google.protobuf.message import Message

from nebula.errors import AuthError, FrameError, SessionError
from nebula.proto.v1.packet_pb2 import Frame
from nebula.security.session import Session
from nebula.wan.transport import receive

M = TypeVar("M", bound=Message)


class Sessions:
    """One session per cluster, and the one that is to replace it: anyone on the path can replay an offer, but not use
    the answer, so the older session lasts until the first authentic frame of the newer one."""

    def __init__(self) -> None:
        self._proven: dict[str, Session] = {}
        self._answered: dict[str, Session] = {}
        self._lock = threading.Lock()

    def answered(self, session: Session) -> None:
        """An offer was answered; whether whoever sent it has the keys is not known yet."""
        with self._lock:
            self._answered[session.cluster] = session

    def head(
        self, peer: str | None, frames: Iterable[Frame], kind: type[M], context: bytes
    ) -> tuple[Session, M, Iterator[Frame]]:
        """The session that a call belongs to, its first message, and the frames that follow. Raises AuthError if the
        source is not `peer`, SessionError if the session is not known, FrameError if the message is not authentic."""
        stream = iter(frames)
        first = next(stream, None)
        if first is None:
            raise FrameError("schema", "an empty call")
        check_peer(peer, first.source)
        session = self._find(first.source, first.epoch)
        stream = chain([first], stream)
        message = receive(session.receive, stream, kind, context)
        with self._lock:
            if self._answered.get(session.cluster) is session:
                self._proven[session.cluster] = self._answered.pop(session.cluster)
        return session, message, stream

    def _find(self, source: str, epoch: int) -> Session:
        with self._lock:
            for session in (self._proven.get(source), self._answered.get(source)):
                if session is not None and session.epoch == epoch:
                    return session
        raise SessionError(f"no session of {source!r} with epoch {epoch}", hint="join again")


def check_peer(peer: str | None, cluster: str) -> None:
    """Raises AuthError if a message's cluster is not the one that the client certificate names."""
    if peer is not None and peer != cluster:
        raise AuthError(f"the client certificate says {peer!r} but the message says {cluster!r}")
