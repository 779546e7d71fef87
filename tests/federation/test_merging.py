"""Aggregation, the outer step, deadlines, journal and ledger: each by itself."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula.checkpoint.ledger import Ledger
from nebula.config import Nesterov, OuterSGD
from nebula.errors import JournalError, PacketError, QuorumError
from nebula.federation.aggregate import WeightedMean, check_tiling
from nebula.federation.events import Arrived, Committed, Joined, Reported
from nebula.federation.journal import Journal
from nebula.federation.membership import deadline, latest_arrival
from nebula.federation.merge import read_delta
from nebula.federation.outer import outer_step
from nebula.federation.tally import Tally
from nebula.types import Delta, Evaluation, RoundReport, Slice
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


def test_the_deadline_comes_from_measured_arrivals():
    assert latest_arrival([1.0] * 3, clusters=2) == math.inf
    assert latest_arrival([10.0, 10.0, 10.0, 11.0], clusters=2) == pytest.approx(10 + 6 * 2.5)
    spread = [4.0, 8.0, 10.0, 12.0, 16.0]  # median 10, MAD 2 < 2.5
    assert latest_arrival(spread, clusters=2) == pytest.approx(25.0)
    common = {"opened": 0.0, "quorum": 1, "clusters": 2, "history": [10.0] * 4, "max_stall": 60.0}
    assert deadline(arrivals=[], **common) is None
    assert deadline(arrivals=[9.0], **common) == pytest.approx(25.0)
    assert deadline(arrivals=[40.0], **common) == pytest.approx(40.0)  # the quorum itself was late: no further wait
    assert deadline(arrivals=[9.0], **(common | {"quorum": 2})) == pytest.approx(69.0)


EVENTS = [
    Committed(fragment="f0", version=0, digest="d", blobs={"params": "x"}),
    Joined(cluster="north", epoch=3),
    Arrived(cluster="north", fragment="f0", round=0, weight=5.0, blob="b", parts=(3, 4), seconds=None),
    Committed(fragment="f0", version=1, digest="e", contributors=("north",), blobs={"update": "u"}, norm=1.5),
    Reported(
        cluster="north",
        report=RoundReport(
            round=0, steps=1, tokens=2, loss=3.0, compute_s=4.0, stall_s=5.0, eval=Evaluation(loss_sum=1.0, tokens=2)
        ),
    ),
]


def test_the_journal_gives_back_what_it_was_given(tmp_path):
    journal = Journal(tmp_path / "j.sqlite", agreement="sha256:a")
    for event in EVENTS:
        journal.append(event)
    journal.close()
    assert list(Journal(tmp_path / "j.sqlite", agreement="sha256:a").replay()) == EVENTS


def test_the_journal_syncs_before_it_acknowledges(tmp_path):
    journal = Journal(tmp_path / "j.sqlite", agreement="sha256:a")
    settings = {name: journal._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("synchronous", "journal_mode")}
    assert settings == {"synchronous": 2, "journal_mode": "wal"}  # 2 = FULL


def test_a_second_coordinator_and_a_foreign_or_damaged_journal_are_refused(tmp_path):
    path = tmp_path / "j.sqlite"
    first = Journal(path, agreement="sha256:a")
    with pytest.raises(JournalError, match="in use by another coordinator"):
        Journal(path, agreement="sha256:a")
    first.close()
    with pytest.raises(JournalError, match="belongs to agreement sha256:a, not sha256:b"):
        Journal(path, agreement="sha256:b")
    path.write_bytes(b"not a database, but long enough to be read as a header" * 20)
    with pytest.raises(JournalError, match="damaged"):
        Journal(path, agreement="sha256:a")


def test_the_ledger_refuses_what_is_missing_or_changed(tmp_path):
    ledger = Ledger(tmp_path)
    name, other = ledger.put(b"state"), ledger.put(b"old")
    assert ledger.get(name) == b"state"
    assert ledger.size(name) == 5
    (tmp_path / ".half-written").write_bytes(b"x")
    ledger.keep({name})
    assert [p.name for p in tmp_path.iterdir()] == [name]
    with pytest.raises(JournalError, match="missing"):
        ledger.get(other)
    (tmp_path / name).write_bytes(b"stat3")
    with pytest.raises(JournalError, match="corrupt"):
        ledger.get(name)


def test_the_tally_survives_an_agent_that_counts_from_zero_again():
    def report(round: int, up: int) -> RoundReport:
        return RoundReport(round=round, steps=2, tokens=10, loss=1.0, compute_s=1.0, stall_s=0.5, up_bytes=up)

    tally = Tally(params=100)
    north = tally.of("north")
    for round, up in enumerate([100, 200, 50, 120]):
        north.reported(report(round, up))
    assert north.total("up") == 320
    assert north.inner_steps == 8
    wan = tally.summary(run="r", state="completed", global_digest="d")["clusters"]["north"]["wan"]
    assert wan["up_bits_per_param_per_round"] == pytest.approx(320 * 8 / 100 / 4)
