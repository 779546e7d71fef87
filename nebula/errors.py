"""Every error Nebula raises for a user, and the exit code each one ends the command with.

    NebulaError                      1  the run failed
    ├── UsageError                   2  recipe, cluster file, command line or data are wrong
    ├── PreflightError               3  this machine cannot do it now: port in use, disk full, part missing
    ├── UnreachableError             4  a peer does not answer
    ├── AuthError                    5  an identity, a session or a frame was refused
    │   ├── SessionError                a session is not known (any more): join again
    │   └── FrameError                  a frame or payload was rejected; carries the reason that is counted
    ├── QuorumError                  6  too few clusters
    ├── PacketError                  1  a packet is malformed, truncated or beyond its bounds
    ├── JournalError                 1  the coordinator's state on disk cannot be trusted
    └── RankFailure                  1  a rank died; the cluster rebuilds its group (never shown to a user by itself)

A message says what, where, why and what to do. Programming mistakes are asserts, not members of this tree.
"""

from __future__ import annotations


class NebulaError(Exception):
    """Base of the tree. `hint` tells the user what to do next."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross Ray's process boundary; the default reduction would drop keyword-only fields.
        return _rebuild, (type(self), self.__dict__)


def _rebuild(kind: type[NebulaError], fields: dict[str, object]) -> NebulaError:
    error = kind.__new__(kind)
    Exception.__init__(error, fields["message"])
    error.__dict__.update(fields)
    return error


class UsageError(NebulaError):
    exit_code = 2


class PreflightError(NebulaError):
    exit_code = 3


class UnreachableError(NebulaError):
    exit_code = 4


class AuthError(NebulaError):
    exit_code = 5


class SessionError(AuthError):
    pass


class FrameError(AuthError):
    """`reason` is one of: auth, replay, size, order, schema. It labels the counter."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class QuorumError(NebulaError):
    exit_code = 6


class PacketError(NebulaError):
    pass


class JournalError(NebulaError):
    pass


class RankFailure(NebulaError):
    """`rank` is the one that died, as far as the group can tell."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank
