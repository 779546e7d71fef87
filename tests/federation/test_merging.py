"""Aggregation, the outer step, deadlines, journal and ledger: each by itself."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula.checkpoint.ledger import Ledger
from nebula.checkpoint.store import Folder
from nebula.config import Nesterov, OuterSGD
from nebula.errors import JournalError, PacketError, QuorumError
from nebula.federation.aggregate import WeightedMean, check_tiling
from nebula.federation.merge import read_delta
from nebula.federation.outer import outer_step
from nebula.federation.tally import Tally
from nebula.types import Delta, RoundReport, Slice
from nebula.wan.codec.layout import flatten
from nebula.wan.frame import pack


def delta(weight: float, tensors) -> Delta:
    return Delta(cluster="c", role="model", round=0, fragment="f0", base=0, weight=weight, tensors=tensors)


def halves(tensor: torch.Tensor, cut: int, name: str = "w") -> dict[Slice, torch.Tensor]:
    rows, width = tensor.shape
    return {
        Slice(name, (0, 0), (cut, width)): tensor[:cut],
        Slice(name, (cut, 0), (rows - cut, width)): tensor[cut:],
    }


@given(cut=st.integers(1, 5), weights=st.tuples(st.floats(0.1, 100), st.floats(0.1, 100)))
@settings(deadline=None, max_examples=30)
def test_the_mean_is_weighted_and_blind_to_layout(cut, weights):
    torch.manual_seed(cut)
    a, b = torch.randn(6, 4), torch.randn(6, 4)
    mean = WeightedMean({"w": (6, 4)})
    mean.add(delta(weights[0], halves(a, cut)))
    mean.add(delta(weights[1], {Slice("w", (0, 0), (6, 4)): b}))
    expected = (a.double() * weights[0] + b.double() * weights[1]) / sum(weights)
    torch.testing.assert_close(mean.result()["w"].double(), expected, rtol=1e-5, atol=1e-6)


def test_no_delta_is_no_mean():
    with pytest.raises(QuorumError):
        WeightedMean({"w": (2, 2)}).result()


def test_slices_must_tile_the_fragment_exactly():
    shapes, whole = {"w": (6, 4)}, torch.zeros(6, 4)
    check_tiling(halves(whole, 2), shapes)
    top = {Slice("w", (0, 0), (4, 4)): whole[:4]}
    with pytest.raises(PacketError, match="do not add up"):
        check_tiling(top, shapes)
    with pytest.raises(PacketError, match="overlap"):
        check_tiling(top | {Slice("w", (3, 0), (2, 4)): whole[:2]}, shapes)
    with pytest.raises(PacketError, match="not inside"):
        check_tiling({Slice("w", (4, 0), (4, 4)): whole[:4]}, shapes)
    with pytest.raises(PacketError, match="not in this fragment"):
        check_tiling(halves(whole, 2, "other"), shapes)
    with pytest.raises(PacketError, match="not finite"):
        check_tiling(halves(torch.full((6, 4), math.nan), 2), shapes)
    with pytest.raises(PacketError, match="moved by more than"):
        check_tiling(halves(torch.full((6, 4), -2e6), 2), shapes)


def test_a_slice_sent_twice_is_not_taken_for_once():
    whole = torch.randn(6, 4)
    top, bottom = ({where: values} for where, values in halves(whole, 3).items())
    one, other = pack(flatten(top, 1)), pack(flatten(bottom, 1))
    shapes = {"w": (6, 4)}
    assert len(read_delta(one + other, [len(one), len(other)], shapes)) == 2
    with pytest.raises(PacketError, match="two packets hold the same slice"):
        read_delta(one + one + other, [len(one), len(one), len(other)], shapes)


def test_nesterov_is_torchs():
    rule = Nesterov(lr=0.7, momentum=0.9)
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(5))
    reference = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    ours, momentum = parameter.detach().clone(), {}
    for _ in range(4):
        gradient = torch.randn(5)
        parameter.grad = gradient.clone()
        reference.step()
        update, momentum = outer_step(rule, {"w": gradient}, momentum)
        ours += update["w"]
    torch.testing.assert_close(ours, parameter.detach(), rtol=1e-6, atol=1e-6)


def test_outer_sgd_with_rate_one_moves_to_the_mean():
    update, momentum = outer_step(OuterSGD(lr=1.0), {"w": torch.tensor([0.5, -2.0])}, {})
    assert update["w"].tolist() == [-0.5, 2.0]
    assert momentum == {}


def test_the_ledger_refuses_what_is_missing_or_changed(tmp_path):
    ledger = Ledger(Folder(tmp_path))
    name, other = ledger.put(b"state"), ledger.put(b"old")
    assert ledger.get(name) == b"state"
    assert ledger.size(name) == 5
    (tmp_path / ".half-written").write_bytes(b"x")
    ledger.begin({name})
    assert [p.name for p in tmp_path.iterdir()] == [name]
    with pytest.raises(JournalError, match="missing"):
        ledger.get(other)
    (tmp_path / name).write_bytes(b"stat3")
    with pytest.raises(JournalError, match="corrupt"):
        ledger.get(name)


def test_the_tally_survives_an_agent_that_counts_from_zero_again():
    def report(round: int, up: int, life: int) -> RoundReport:
        seconds = {"compute_s": 1.0, "stall_s": 0.5}
        return RoundReport(round=round, steps=2, tokens=10, loss=1.0, up_bytes=up, life=life, **seconds)

    tally = Tally(params=100)
    north = tally.of("north")
    for round, (life, up) in enumerate([(7, 100), (7, 200), (8, 250), (8, 320)]):
        north.reported(report(round, up, life))
    assert north.total("up") == 520
    assert north.inner_steps == 8
    wan = tally.summary(run="r", state="completed", global_digest="d")["clusters"]["north"]["wan"]
    assert wan["up_bits_per_param_per_round"] == pytest.approx(520 * 8 / 100 / 4)
