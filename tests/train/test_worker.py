from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Rank, Ranks
from torch import Tensor
from torch.distributed.tensor import DTensor

from nebula import config
from nebula.data import tokenizer
from nebula.data.corpus import find
from nebula.errors import NebulaError, PacketError, UsageError
from nebula.models.init import parameter_shapes
from nebula.parallel.export import by_name, region
from nebula.train.worker import Worker
from nebula.types import Slice, Steps
from nebula.wan.codec.pipeline import Encoder, decode
from nebula.wan.digest import fragment_digest, lanes
from nebula.wan.frame import pack, unpack

VOCAB, BIG = 264, 10**7
MODEL = config.Model(vocab=VOCAB, layers=2, dim=32, heads=4, kv_heads=2, ffn_dim=32, experts=4, aux_loss=0.0)
INT4 = config.Codec(steps=(config.Blockwise(bits=4, block=32), config.Zstd()), feedback=0.9)
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Keyword arguments of a Worker, all but `rank`, `world` and `checkpoints`."""
    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(0)
    for i in range(12):
        (folder / f"{i}.txt").write_text(" ".join(draw.choices(WORDS, k=400)))
    data = config.Data(path=str(folder), seq_len=16, held_out=0.1, eval_windows=7)
    words = tokenizer.train(find(data), VOCAB).encode()
    run = config.Run(
        name="tiny",
        model=MODEL,
        data=data,
        optimizer=config.AdamW(lr=1e-3, warmup=2, clip=0.5),
        rounds=4,
        inner_steps=3,
        batch=6,
        wan=config.Wan(up=INT4, down=INT4),
    )
    federation = config.Federation(clusters={"north": config.Cluster(device="cpu")})
    agreement = config.agree(run, federation, tokenizer=hashlib.sha256(words).hexdigest(), unigram_entropy=4.0)
    return {
        "agreement": agreement.canonical(),
        "tokenizer": words,
        "cluster": "north",
        "facts": federation.clusters["north"].model_dump_json().encode(),
        "cache": str(tmp_path_factory.mktemp("cache")),
    }


def steps(round: int, first: int, count: int) -> Steps:
    return Steps(round=round, position=3 * round, first=first, count=count, total=3)


# --- what runs in the ranks -----------------------------------------------------------------------------------------


def create(rank: Rank, options: dict[str, Any]) -> None:
    rank.memory["worker"] = Worker(rank=rank.rank, world=rank.world, **options)


def call(rank: Rank, method: str, *arguments: Any) -> Any:
    return getattr(rank.memory["worker"], method)(*arguments)


def failure(rank: Rank, method: str, *arguments: Any) -> NebulaError:
    with pytest.raises(NebulaError) as caught:
        call(rank, method, *arguments)
    return caught.value


def everything(rank: Rank) -> dict[str, Any]:
    """All of a worker's state by name, gathered, but for its generators."""
    state = rank.memory["worker"]._state()
    whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}
    bits = {name: v.view(torch.int16) if v.dtype is torch.bfloat16 else v for name, v in whole.items()}
    return {name: value.numpy().copy() for name, value in bits.items()}


class Cluster:
    def __init__(self, ranks: Ranks, world: int, options: dict[str, Any]) -> None:
        self.ranks, self.world = ranks, world
        ranks.run(create, options, world=world)
        self.address = ranks.run(call, "rendezvous", world=1)[0]

    def all(self, method: str, *arguments: Any) -> list[Any]:
        return self.ranks.run(call, method, *arguments, world=self.world)

    def fails(self, method: str, *arguments: Any) -> list[NebulaError]:
        return self.ranks.run(failure, method, *arguments, world=self.world)

    def digest(self, method: str, *arguments: Any) -> str:
        return fragment_digest(self.all(method, *arguments))

    def state(self) -> dict[str, Any]:
        return self.ranks.run(everything, world=self.world)[0]


@pytest.fixture
def cluster(ranks: Ranks, options: dict[str, Any], tmp_path: Path):  # type: ignore[no-untyped-def]
    @contextmanager
    def started(world: int, checkpoints: str = "none", **changes: Any) -> Iterator[Cluster]:
        every = options | {"checkpoints": str(tmp_path / checkpoints)} | changes
        made = Cluster(ranks, world, every)
        made.started = made.all("start", made.address)  # type: ignore[attr-defined]
        yield made
        made.all("stop")

    return started


# --- a coordinator in five lines ------------------------------------------------------------------------------------


def whole(packets: list[bytes]) -> dict[Slice, Tensor]:
    """The full tensors of what the ranks sent."""
    pieces = by_name({w: v for p in packets for w, v in decode(unpack(p, max_bytes=BIG), max_elements=BIG).items()})
    shapes = parameter_shapes(MODEL)
    full = {name: Slice(name, (0,) * len(shapes[name]), shapes[name]) for name in pieces}
    return {full[name]: region(full[name], parts) for name, parts in pieces.items()}


def update_from(packets: list[bytes]) -> bytes:
    """Plain averaging of one cluster: global := global − delta."""
    return pack(Encoder(INT4).encode({where: -delta for where, delta in whole(packets).items()}))


def round_trip(of: Cluster, number: int) -> tuple[Any, ...]:
    """One round; everything that can be seen of it from outside."""
    report = of.all("train", steps(number, 0, 3))[0]
    packets = {fragment: of.all("encode", fragment) for fragment in ("f0", "f1")}
    digests = [of.digest("apply", fragment, update_from(sent), True) for fragment, sent in packets.items()]
    return report.loss, packets, digests


# --- tests ----------------------------------------------------------------------------------------------------------


def test_every_layout_starts_from_and_trains_to_the_same(cluster: Any) -> None:
    seen = []
    for world in (1, 2, 3):
        with cluster(world) as of:
            digests = [fragment_digest(report.lanes[f] for report in of.started) for f in ("f0", "f1")]
            assert all(report.held == {"f0": 0, "f1": 0} for report in of.started)
            parameters = {report.parameters for report in of.started}
            reports = [*of.all("train", steps(0, 0, 2)), *of.all("train", steps(0, 2, 1))]
            evaluations = of.all("evaluate", 0, 1)
            assert reports[:world] == reports[:1] * world
            assert evaluations == evaluations[:1] * world
            seen.append((digests, parameters, reports[0], reports[-1], evaluations[0]))
    one = seen[0]
    assert (one[2].steps, one[2].tokens, one[3].tokens, one[4].tokens) == (2, 2 * 6 * 16, 6 * 16, 7 * 16)
    for other in seen[1:]:
        assert other[:2] == one[:2]
        for mine, theirs in zip(one[2:4], other[2:4], strict=True):
            assert (theirs.steps, theirs.tokens) == (mine.steps, mine.tokens)
            assert theirs.loss == pytest.approx(mine.loss, rel=1e-6)
        assert other[4].tokens == one[4].tokens
        assert other[4].loss_sum == pytest.approx(one[4].loss_sum, rel=1e-6)


def test_an_update_gives_the_same_digest_on_every_layout(cluster: Any) -> None:
    with cluster(2) as of:
        base = of.state()
        of.all("train", steps(0, 0, 3))
        packets = of.all("encode", "f1")
        assert of.all("encode", "f1") == packets
        payload = update_from(packets)
        update = decode(unpack(payload, max_bytes=BIG), max_elements=BIG)
        parts = {w.name: lanes(torch.from_numpy(base[f"base/{w.name}"]) + u, w) for w, u in update.items()}
        expected = fragment_digest([parts])
        assert of.digest("apply", "f1", payload, True) == expected
        state = of.state()
        for where in update:
            assert (state[f"parameter/{where.name}"] == state[f"base/{where.name}"]).all()
    for world in (1, 3):
        with cluster(world) as of:
            of.all("train", steps(0, 0, 1))
            assert of.digest("apply", "f1", payload, False) == expected
            assert all((delta == 0).all() for delta in whole(of.all("encode", "f1")).values())


def test_deltas_measure_what_training_changed(cluster: Any) -> None:
    with cluster(2) as of:
        of.all("train", steps(0, 0, 3))
        state = of.state()
        sent = whole(of.all("encode", "f0"))
        assert len(sent) > 3
        for where, delta in sent.items():
            exact = torch.from_numpy(state[f"base/{where.name}"] - state[f"parameter/{where.name}"])
            assert (delta - exact).norm() < 0.2 * exact.norm(), "four bits and the right sign"


@pytest.mark.parametrize("merged", [True, False])
def test_feedback_moves_on_only_if_the_packet_was_merged(cluster: Any, merged: bool) -> None:
    with cluster(2) as of:
        of.all("train", steps(0, 0, 3))
        payload = update_from(of.all("encode", "f0"))
        of.all("apply", "f0", payload, merged)
        later = whole(of.all("encode", "f0"))
        assert any(bool(delta.any()) for delta in later.values()) is merged


def test_what_was_left_out_of_a_merged_packet_does_not_outlive_the_adoption_of_a_state(cluster: Any) -> None:
    with cluster(2) as of:
        of.all("train", steps(0, 0, 3))
        payload = update_from(of.all("encode", "f0"))
        of.all("apply", "f0", payload, True)
        of.all("adopt", "f0", payload)  # any values will do
        assert not any(bool(delta.any()) for delta in whole(of.all("encode", "f0")).values())


def test_adopting_a_state_replaces_base_and_parameters(cluster: Any) -> None:
    torch.manual_seed(5)
    with cluster(1) as of:
        names = list(of.started[0].lanes["f0"])
    shapes = parameter_shapes(MODEL)
    state = {Slice(name, (0,) * len(shapes[name]), shapes[name]): torch.randn(shapes[name]) for name in names}
    payload = pack(Encoder(config.Codec(steps=(), feedback=None)).encode(state))
    expected = fragment_digest([{where.name: lanes(value, where) for where, value in state.items()}])
    losses = []
    for world in (1, 2):
        with cluster(world) as of:
            of.all("train", steps(0, 0, 3))
            of.all("encode", "f0")
            of.all("evaluate", 0, 1)  # which must not leave gathered parameters behind
            assert of.digest("adopt", "f0", payload) == expected
            losses.append(of.all("evaluate", 0, 1)[0].loss_sum)
            assert not any(bool(delta.any()) for delta in whole(of.all("encode", "f0")).values())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_payload_that_does_not_fit_changes_nothing(cluster: Any) -> None:
    with cluster(2) as of:
        before = of.state()
        sent = whole(of.all("encode", "f0"))
        plain = Encoder(config.Codec(steps=(), feedback=None))
        first = next(iter(sent))
        for broken in (
            {where: delta for where, delta in sent.items() if where != first},
            sent | {first: torch.full(first.shape, torch.nan)},
        ):
            errors = of.fails("apply", "f0", pack(plain.encode(broken)), True)
            assert [type(error) for error in errors] == [PacketError] * 2
        after = of.state()
        assert all((after[name] == before[name]).all() for name in before)


@pytest.mark.parametrize("world", [1, 2])
def test_resume_is_exact(cluster: Any, world: int) -> None:
    with cluster(world) as of:
        straight = [round_trip(of, number) for number in range(3)]
    with cluster(world, "kept") as of:
        broken = [round_trip(of, number) for number in range(2)]
        of.all("save", 2, {"f0": (2, "sha256:a"), "f1": (2, "sha256:b")})
        left = of.state()
        round_trip(of, 2)  # work after the save, lost
    with cluster(world, "kept") as of:
        assert [report.held for report in of.started] == [{"f0": 2, "f1": 2}] * world
        found = of.state()
        assert all((found[name] == left[name]).all() for name in left)
        assert any(found[name].any() for name in left if name.startswith("residual/"))
        assert [*broken, round_trip(of, 2)] == straight


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3)])
def test_another_number_of_ranks_resumes_from_the_same_state(cluster: Any, before: int, after: int) -> None:
    with cluster(before, "kept") as of:
        _, _, digests = round_trip(of, 0)
        of.all("save", 1, {"f0": (1, digests[0]), "f1": (1, digests[1])})
        left = of.state()
        onward = of.all("train", steps(1, 0, 3))[0]
    with cluster(after, "kept") as of:
        assert [fragment_digest(report.lanes[f] for report in of.started) for f in ("f0", "f1")] == digests
        found = of.state()
        assert found.keys() == left.keys()
        assert all((found[name] == left[name]).all() for name in left)
        assert of.all("train", steps(1, 0, 3))[0].loss == pytest.approx(onward.loss, rel=1e-6)


def test_a_torn_checkpoint_falls_back_to_the_one_before(cluster: Any, tmp_path: Path) -> None:
    with cluster(2, "kept") as of:
        for tag in (1, 2):
            of.all("save", tag, {"f0": (tag, "sha256:a"), "f1": (tag, "sha256:b")})
    torn = sorted((tmp_path / "kept" / "2").glob("*.distcp"))[-1]
    torn.write_bytes(torn.read_bytes()[:100])
    with cluster(2, "kept") as of:
        assert [report.held for report in of.started] == [{"f0": 1, "f1": 1}] * 2


def test_a_checkpoint_of_another_run_is_refused(cluster: Any, ranks: Ranks, options: Any, tmp_path: Path) -> None:
    with cluster(1, "kept") as of:
        of.all("save", 1, {"f0": (1, "sha256:a"), "f1": (1, "sha256:b")})
    agreement = config.Agreement.parse(options["agreement"])
    other = agreement.model_copy(update={"run": agreement.run.model_copy(update={"seed": 9})})
    made = Cluster(ranks, 1, options | {"checkpoints": str(tmp_path / "kept"), "agreement": other.canonical()})
    (error,) = made.fails("start", made.address)
    assert isinstance(error, UsageError)
    assert "another model or seed" in str(error)


def test_checkpoints_may_lie_at_a_url(ranks: Ranks, options: dict[str, Any]) -> None:
    for version in (0, 1):
        made = Cluster(ranks, 1, options | {"checkpoints": "memory://bucket/north"})
        assert made.all("start", made.address)[0].held == {"f0": version, "f1": version}
        made.all("save", 1, {"f0": (1, "sha256:a"), "f1": (1, "sha256:b")})
        made.all("stop")
