"""`nebula bench codec`, and the figures it prints."""

from __future__ import annotations

import json
import math

import pytest
import torch

from nebula.cli.main import main
from nebula.proto.v1.packet_pb2 import Frame
from nebula.security.seal import FRAME_BYTES
from nebula.types import Slice
from nebula.wan.codec import measure


def test_every_codec_is_in_the_table(capsys):
    assert main(["bench", "codec", "--elements", "4096"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert "Gaussian" in told[0]
    assert [line.split("  ")[0] for line in told[2:]] == list(measure.CODECS)


def test_figures_as_json(capsys):
    assert main(["bench", "codec", "--json", "--elements", "65000"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["ok"], told["elements"]) == (True, 65536)  # whole rows
    assert told["codecs"].keys() == measure.CODECS.keys()
    found = told["codecs"]["int4/64, no zstd"]
    assert 4.25 < found["gaussian_bits"] < 4.3
    assert found["gaussian_nmse"] == pytest.approx(1.16e-2, rel=0.03)
    assert found["gaussian_over_shannon"] == pytest.approx(found["gaussian_bits"] - 0.5 * math.log2(1 / 1.16e-2), 0.03)
    assert found["laplace_nmse"] == pytest.approx(2.0e-2, rel=0.05)
    for figures in told["codecs"].values():
        assert all(figures[key] > 0 for key in figures if "per_second" in key or "over_clone" in key)
        assert figures["gaussian_over_shannon"] > 0, "no codec is better than the bound"


def test_sources_have_unit_variance_and_their_own_tails():
    for source, kurtosis in ((measure.gaussian, 3), (measure.laplace, 6)):
        (x,) = source(1 << 18).values()
        assert float(x.square().mean()) == pytest.approx(1, rel=0.01)
        assert float(x.pow(4).mean()) == pytest.approx(kurtosis, rel=0.05)


def test_sealing_is_counted_frame_by_frame():
    payload = bytes(2 * FRAME_BYTES + 1)
    empty = Frame(source="north", epoch=1, counter=2, index=2, last=True, ciphertext=bytes(17)).ByteSize()
    beyond = measure.sealed_bytes(payload) - len(payload)
    assert beyond == pytest.approx(3 * (empty - 1 + measure.GRPC_PREFIX), abs=6)  # varints of sizes and indices
    assert beyond > 3 * (16 + measure.GRPC_PREFIX)


class Sparse:
    """Keeps one value in four, exactly; says where with twice the bits that are needed."""

    def encode(self, tensors):
        return tensors

    def decode(self, sent):
        return {where: x * (torch.arange(x.numel()).view(x.shape) % 4 == 0) for where, x in sent.items()}

    def sizes(self, sent):
        count = sum(x.numel() for x in sent.values())
        return {"codes": count, "low": int(count * measure.support_entropy(0.25) / 4), "scales": count}


def test_quality_counts_bits_error_support_and_metadata():
    tensors = {Slice("w", (0, 0), (64, 1024)): torch.ones(64, 1024)}
    found = measure.quality(Sparse(), tensors)
    assert (found.nmse, found.kept) == (0.75, 0.25)
    assert found.support == pytest.approx(2, abs=1e-3)
    assert found.bits == pytest.approx(8 + 2 * measure.support_entropy(0.25) + 8, abs=1e-3)
    assert found.metadata == pytest.approx(8 / found.bits)
    assert found.gap() == pytest.approx(found.bits + 0.5 * math.log2(0.75))
    assert measure.support_entropy(0.5) == 1
    assert (measure.shannon(2.0), measure.shannon(0.25), measure.shannon(0.0)) == (0, 1, math.inf)
    assert measure.shannon(0.25, measure.LAPLACE_DEFICIT) == pytest.approx(1 - 0.1044, abs=1e-4)


def test_turns_are_timed_side_by_side_and_the_first_does_not_count(monkeypatch):
    order, clock = [], iter(range(1000))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))

    class Named(Sparse):
        def __init__(self, name):
            self.name = name

        def encode(self, tensors):
            order.append(self.name)
            assert torch.get_num_threads() == 1
            return tensors

    threads = torch.get_num_threads()
    taken = measure.speeds({"a": Named("a"), "b": Named("b")}, measure.gaussian(1024), turns=2)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert all(speed.clone == speed.encode == speed.decode == [1, 1] for speed in taken.values())
    assert torch.get_num_threads() == threads
