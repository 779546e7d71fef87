"""The fuzz target without the fuzzer: on seeded mutants, on every input that once failed, and on planted bugs."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import target
import torch
from mutate import before, mutant, seeds
from target import one_input, received

from nebula.errors import PacketError
from nebula.types import Slice

KEPT = sorted((Path(__file__).parent / "crashes").iterdir())
WHERE = Slice("w", (0,), (4,))


@pytest.fixture(scope="module")
def start():
    """Seeds, once decoded: what is compiled or loaded then is not counted as memory for a packet."""
    made = seeds()
    assert not any(isinstance(received(data, before), str) for data in made)
    return made


def flipped(data: bytes, dice: Random) -> bytes:
    out = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        out[dice.randrange(len(out))] = dice.randrange(256)
    return bytes(out)


def test_seeds_and_their_mutants_do_no_more_than_fail_and_go_deep(start):
    for data in start:
        one_input(data)
    results = []
    for seed in range(400):
        dice = Random(seed)
        data = mutant(dice.choice(start), dice, lambda raw, dice=dice: flipped(raw, dice), start)
        one_input(data)
        results.append(received(data, before))
    reasons = [result for result in results if isinstance(result, str)]
    assert len(start) < len(results) - len(reasons), "next to no mutant is a packet any more"
    assert sum(reason == "an entropy-coded chunk is damaged" for reason in reasons) > 4
    assert len({reason.rstrip("0123456789")[:20] for reason in reasons}) > 20


@pytest.mark.usefixtures("start")
@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.name)
def test_what_once_failed_does_not_fail_again(path):
    one_input(path.read_bytes())


def leaking(packet, **_):
    return {WHERE: torch.ones(target.MEMORY)[:4]}


def reserving(packet, **_):
    return {WHERE: torch.empty(1 << 40)[:4]}


def infinite(packet, **_):
    return {WHERE: torch.full((4,), torch.inf)}


def forgetful(packet, **_):
    return {WHERE: torch.rand(4)}


def warning(packet, **_):
    return {WHERE: torch.from_numpy(torch.zeros(4).numpy() / 0)}


def misshapen(packet, **_):
    return {WHERE: torch.zeros(2, 2)}


def untyped(packet, **_):
    return {WHERE: packet.arrays["nothing"]}


def wordy(packet, **_):
    raise PacketError("no" * 1000)


@pytest.mark.parametrize(
    "planted", [leaking, reserving, infinite, forgetful, warning, misshapen, untyped, wordy], ids=lambda f: f.__name__
)
def test_the_target_finds_a_decoder_that_is(planted, start, monkeypatch):
    quantised = start[-1]
    one_input(quantised)
    monkeypatch.setattr(target, "decode", planted)
    with pytest.raises((AssertionError, KeyError, RuntimeError, RuntimeWarning)):
        one_input(quantised)
