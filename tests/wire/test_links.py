"""Whole runs over gRPC, mTLS and relays: they end as in memory, whatever the wire does, and the wire learns nothing."""

from __future__ import annotations

import json
import os

import pytest

from nebula.checkpoint.ledger import Ledger
from nebula.config import Link
from nebula.models.init import parameter_shapes
from nebula.types import Held, RoundReport
from tests.wire.wired import Meddler, Wired, wait_for, wired


def test_a_run_over_the_wire_ends_as_in_memory(federate, in_memory, tmp_path):
    with wired(federate(tmp_path)) as wires:
        summary = wires.finish()
        traffic = {name: relay.traffic for name, relay in wires.relays.items()}
    assert summary["global_digest"] == in_memory
    assert summary["rejected"] == {}
    for name, cluster in summary["clusters"].items():
        assert cluster["wan"]["retries"] == 0
        assert 0 < cluster["wan"]["up_bytes"] <= traffic[name].up_bytes  # the last report does not count itself
        assert 0 < cluster["wan"]["down_bytes"] <= traffic[name].down_bytes
        assert traffic[name].connections == 1


def test_a_handshake_may_take_several_slow_round_trips(federate, tmp_path):
    with wired(federate(tmp_path), Link(rate_mbps=100.0, rtt_ms=300.0)) as wires:
        gateway = wires.gateway("north")
        gateway.join()
        gateway.close()
        assert wires.relays["north"].traffic.connections == 1  # none was given up


# --- what the wire learns -----------------------------------------------------------------------------------------


def test_neither_the_wire_nor_a_proxy_that_ends_tls_can_read_anything(federate, in_memory, tmp_path, monkeypatch):
    stored = spied_blobs(monkeypatch)
    with wired(federate(tmp_path)) as wires:
        for relay in wires.relays.values():
            relay.record(1 << 24)
        proxies: list[Meddler] = []

        def proxied(stub):
            proxies.append(Meddler(stub))
            return proxies[-1]

        assert wires.finish(wires.agents({"north": proxied, "south": proxied}))["global_digest"] == in_memory
        crossed = sum(r.traffic.up_bytes + r.traffic.down_bytes for r in wires.relays.values())
        wire = b"".join(r.recorded("up") + r.recorded("down") for r in wires.relays.values())
        assert len(wire) >= crossed
    federated = wires.federated
    frames = b"".join(frame.SerializeToString() for proxy in proxies for frame in proxy.seen)
    secrets = [federated.agreement.canonical(), federated.tokenizer.encode(), *stored]
    assert sum(map(len, stored)) > len(wire) / 2 > 100_000  # deltas, updates and states; and all that crossed
    names = [b"model\x12\x02f", b'"schema"', b"sha256:", *map(str.encode, parameter_shapes(federated.run.model))]
    assert readable(frames, secrets, names) == set()
    # A proxy that ends TLS has to know whose frame it forwards; the wire does not.
    assert readable(wire, secrets, [*names, b"north", b"south"]) == set()


def spied_blobs(monkeypatch) -> list[bytes]:
    """Everything that the coordinator stores from now on: deltas as they came, updates as they leave, states."""
    blobs: list[bytes] = []
    put = Ledger.put

    def spy(ledger, data):
        blobs.append(bytes(data))
        return put(ledger, data)

    monkeypatch.setattr(Ledger, "put", spy)
    return blobs


def readable(seen: bytes, secrets: list[bytes], names: list[bytes]) -> set[bytes]:
    """What of the secrets can be found: names, and 16 bytes in a row (of some variety: runs of zeros give nothing
    away). Every 31 bytes of a secret contain one of the windows that are looked for."""
    windows = {secret[at : at + 16] for secret in secrets for at in range(0, len(secret) - 15, 16)}
    telling = {window for window in windows if len(set(window)) > 6}
    found = telling.intersection(seen[at : at + 16] for at in range(len(seen) - 15))
    return found | {name for name in names if name in seen}


def test_what_looks_for_readable_bytes_finds_them():
    noise, secret = os.urandom(5000), os.urandom(600)
    agreement = json.dumps({"schema": 1, "run": {"name": "tiny"}}).encode()
    assert readable(noise, [secret, agreement], [b"north"]) == set()
    assert readable(noise + secret[101:132] + noise, [secret], []) == {secret[112:128]}
    assert readable(noise + agreement, [agreement], []) != set()
    assert readable(noise + b"north", [], [b"north", b"south"]) == {b"north"}


# --- what the wire breaks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "direction"), [("push", "up"), ("pull", "down")])
def test_a_bit_that_flips_on_the_wire_costs_a_retry(method, direction, federate, in_memory, tmp_path):
    with wired(federate(tmp_path)) as wires:

        def flip_later(frames):
            wires.relays["north"].corrupt(direction, 5000)  # of the 28 kB that both fragments take
            return frames

        meddler = {"north": lambda stub: Meddler(stub, method, up=flip_later)}
        summary = wires.finish(wires.agents(meddler))
        assert wires.relays["north"].traffic.connections > 1
    assert summary["global_digest"] == in_memory
    assert retries(wires)["north"] > 0
    assert retries(wires)["south"] == 0
    assert summary["rejected"] == {}  # TLS saw it first: no damaged frame came as far as the seals
    assert summary["clusters"]["north"]["rejoins"] == 0


def retries(wires: Wired) -> dict[str, int]:
    first = wires.federated.events("round")[0]
    return {name: cluster["retries"] for name, cluster in first["clusters"].items()}


@pytest.mark.parametrize("method", ["push", "pull"])
def test_a_connection_that_is_cut_in_mid_transfer_costs_a_retry(method, federate, in_memory, tmp_path):
    """The coordinator has the head of a delta, or has sent that of an update, but not what follows it."""
    with wired(federate(tmp_path)) as wires:
        cut = []

        def cut_once(peer):
            if peer == "north" and not cut:
                cut.append(peer)
                wires.relays[peer].cut()

        push, pull = wires.hub.push, wires.hub.pull

        def cut_push(peer, frames):
            def cut_after_head():
                for frame in frames:
                    yield frame
                    cut_once(peer)

            return push(peer, cut_after_head())

        def cut_pull(peer, frames):
            for frame in pull(peer, frames):
                yield frame
                cut_once(peer)

        setattr(wires.hub, method, cut_push if method == "push" else cut_pull)
        summary = wires.finish()
        assert wires.relays["north"].traffic.connections > 1
    assert cut
    assert summary["global_digest"] == in_memory
    assert retries(wires)["north"] > 0
    assert summary["rejected"] == {}  # nobody tampered with anything


@pytest.mark.parametrize("moment", ["between rounds", "in mid-round"])
def test_a_coordinator_that_goes_and_comes_back_is_joined_again(moment, federate, in_memory, tmp_path):
    with wired(federate(tmp_path)) as wires:
        agents = wires.agents()
        train, save = agents["north"].engine.train, agents["north"].engine.save

        def then_restart(steps):
            trained = train(steps)
            if moment == "in mid-round" and steps.round == 1:
                wait_for(wires.hub, lambda: all("south" in f.arrived for f in wires.hub.state.fragments.values()))
                wires.restart()
            return trained

        def save_and_restart(tag, held):
            save(tag, held)
            if moment == "between rounds" and tag == 1:
                wires.restart()

        agents["north"].engine.train, agents["north"].engine.save = then_restart, save_and_restart
        first = wires.hub
        summary = wires.finish(agents)
        assert wires.hub is not first
    assert summary["global_digest"] == in_memory
    assert all(cluster["rejoins"] >= 1 for cluster in summary["clusters"].values())


def test_bytes_of_a_connection_that_is_gone_still_count(federate, tmp_path):
    with wired(federate(tmp_path)) as wires:
        gateway = wires.gateway("north")
        agreement, tokenizer = gateway.join()
        wires.relays["north"].cut()
        held = {name: Held(fragment.version, fragment.digest) for name, fragment in wires.hub.state.fragments.items()}
        gateway.plan(held, None)  # over a second connection
        gateway.plan(held, RoundReport(round=0, steps=0, tokens=0, loss=0.0, compute_s=0.0, stall_s=0.0))
        gateway.close()
        assert wires.relays["north"].traffic.connections > 1
        assert wires.hub.tally.of("north").total("down") > len(agreement) + len(tokenizer)
