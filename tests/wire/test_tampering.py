"""Somebody who ends TLS on the path changes sealed frames: refused, counted, sent again, and the run ends the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import pytest

from nebula.proto.v1.packet_pb2 import Frame
from nebula.security import session
from nebula.security.seal import SealedChannel
from tests.wire.wired import Meddler, wired

Tamper: TypeAlias = Callable[[list[Frame]], list[Frame]]


def altered(at: int, **changes: Callable) -> Tamper:
    def tamper(frames):
        frames = copy.deepcopy(frames)
        for name, change in changes.items():
            setattr(frames[at], name, change(getattr(frames[at], name)))
        return frames

    return tamper


def flipped(data: bytes) -> bytes:
    return data[:40] + bytes([data[40] ^ 1]) + data[41:]


def up_by_one(value: int) -> int:
    return value + 1


def messages_swapped(frames: list[Frame]) -> list[Frame]:
    return [*frames[1:], frames[0]]


def frames_swapped(frames: list[Frame]) -> list[Frame]:
    return [*frames[:1], frames[2], frames[1], *frames[3:]]


TAMPERED = {
    "a bit of the head": (altered(0, ciphertext=flipped), "auth"),
    "a bit of the payload": (altered(2, ciphertext=flipped), "auth"),
    "an index": (altered(2, index=up_by_one), "order"),
    "a counter": (altered(1, counter=up_by_one), "auth"),
    "a later epoch": (altered(2, epoch=up_by_one), "auth"),
    "the source": (altered(2, source=lambda name: "south"), "auth"),
    "an early end": (altered(1, last=lambda _: True), "auth"),
    "the last frame dropped": (lambda frames: frames[:-1], None),
    "messages swapped": (messages_swapped, "auth"),
    "frames swapped": (frames_swapped, "order"),
}
"""A head is one frame, a payload here several: what is done to them, and the reason they are refused for. A stream that
ends too early gives none: broken connections look the same."""


@pytest.fixture(autouse=True)
def small_frames(monkeypatch):
    monkeypatch.setattr(session, "SealedChannel", partial(SealedChannel, frame_bytes=4096))


def run_tampered(federated, method: str, direction: str, tamper: Tamper) -> tuple[dict, list[dict]]:
    """A run in which north's first call of one method is tampered with. Returns summary and what was refused."""
    whole: list[int] = []

    def meddle(frames):
        frames = list(frames)
        whole.append(len(frames))
        return iter(tamper(frames))

    with wired(federated) as wires:
        summary = wires.finish(wires.agents({"north": lambda s: Meddler(s, method, **{direction: meddle})}))
    (frames,) = whole
    assert frames > 3
    return summary, federated.events("rejected")


@pytest.mark.parametrize("what", TAMPERED)
def test_what_a_cluster_sends(what, federate, in_memory, tmp_path):
    tamper, reason = TAMPERED[what]
    summary, rejected = run_tampered(federate(tmp_path), "push", "up", tamper)
    assert summary["global_digest"] == in_memory
    expected = [reason] if reason else []
    assert summary["rejected"] == dict.fromkeys(expected, 1)
    assert [(event["cluster"], event["reason"]) for event in rejected] == [("north", reason) for reason in expected]
    assert summary["clusters"]["north"]["wan"]["retries"] > 0


@pytest.mark.parametrize("what", ["a bit of the head", "a bit of the payload", "the last frame dropped"])
def test_what_the_coordinator_sends(what, federate, in_memory, tmp_path):
    tamper, _ = TAMPERED[what]
    summary, rejected = run_tampered(federate(tmp_path), "pull", "down", tamper)
    assert summary["global_digest"] == in_memory
    assert (summary["rejected"], rejected) == ({}, [])  # it is the cluster that refused
    assert summary["clusters"]["north"]["wan"]["retries"] > 0
    assert summary["clusters"]["north"]["rejoins"] > 0


def test_an_epoch_that_is_not_known_is_joined_anew(federate, in_memory, tmp_path):
    """As after a coordinator's restart, hence no sign of an attack."""
    summary, rejected = run_tampered(federate(tmp_path), "push", "up", altered(0, epoch=up_by_one))
    assert summary["global_digest"] == in_memory
    assert (summary["rejected"], rejected) == ({}, [])
    assert summary["clusters"]["north"]["rejoins"] == 1
