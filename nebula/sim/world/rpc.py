"""What gRPC shows of a call to the code at either end of it: statuses, errors, contexts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import grpc


@dataclass(frozen=True, slots=True)
class Status:
    code: grpc.StatusCode
    details: str


OK = Status(grpc.StatusCode.OK, "")
REFUSED = Status(grpc.StatusCode.UNAVAILABLE, "connection refused")
RESET = Status(grpc.StatusCode.UNAVAILABLE, "connection reset by peer")
CANCELLED = Status(grpc.StatusCode.CANCELLED, "the caller has left")


class CallError(grpc.RpcError, grpc.Call):
    """As a GrpcStub raises it."""

    def __init__(self, status: Status) -> None:
        super().__init__(f"{status.code.name}: {status.details}")
        self._status = status

    def code(self) -> grpc.StatusCode:
        return self._status.code

    def details(self) -> str:
        return self._status.details

    def initial_metadata(self) -> tuple[()]:
        return ()

    def trailing_metadata(self) -> tuple[()]:
        return ()

    def is_active(self) -> bool:
        return False

    def time_remaining(self) -> float:
        return 0.0

    def cancel(self) -> bool:
        return False

    def add_callback(self, callback: Callable[[], None]) -> bool:
        return False


class Aborted(Exception):
    """What `ServicerContext.abort` raises."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.details)
        self.status = status


class Context:
    """As much of grpc.ServicerContext as the service asks of it. `certificate`: the caller's, PEM."""

    def __init__(self, certificate: bytes) -> None:
        self._certificate = certificate

    def auth_context(self) -> Mapping[str, list[bytes]]:
        return {"x509_pem_cert": [self._certificate]}

    def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        raise Aborted(Status(code, details))
