"""One torch rank of one cluster. Whatever hosts it (a Ray actor, a spawned process, this process) calls the same
methods on every rank, in the same order; arguments and results are plain values that pickle anywhere."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch does not list it as exported

from nebula.checkpoint import dcp
from nebula.config import Agreement, Cluster
from nebula.data.open import open_data
from nebula.errors import UsageError
from nebula.objectives.lm import LM
from nebula.parallel import mesh
from nebula.parallel.apply import build
from nebula.parallel.shard import forward_of
from nebula.train import optim
from nebula.train.exchange import Exchange
from nebula.train.loop import Inner, evaluate, inner_step
from nebula.types import Evaluation, Json, Report, StartReport, Steps
from nebula.wan.digest import Lanes


class Worker:
    """`agreement`: its canonical JSON; `tokenizer`: its JSON; `facts`: JSON of this cluster's config.Cluster;
    `checkpoints`: a folder that all ranks of the cluster see, or an fsspec URL; `cache`: a folder for prepared data."""

    def __init__(
        self,
        *,
        agreement: bytes,
        tokenizer: bytes,
        cluster: str,
        facts: bytes,
        rank: int,
        world: int,
        checkpoints: str,
        cache: str,
    ) -> None:
        self.agreement = Agreement.parse(agreement)
        self.run = self.agreement.run
        self.tokenizer = tokenizer.decode()
        self.cluster = cluster
        self.facts = Cluster.model_validate_json(facts)
        self.rank = rank
        self.world = world
        self.checkpoints = checkpoints
        self.cache = Path(cache)
        self._store: TCPStore | None = None

    def rendezvous(self) -> str:
        """Rank 0: open the door the other ranks come in by. Returns its host:port, for every rank's `start`; nothing
        to open, and an empty string, in a cluster of one."""
        if self.world == 1:
            return ""
        address, self._store = mesh.open_store()
        return address

    def start(self, address: str) -> StartReport:
        """Join the group, build the model, load the data, restore the newest intact checkpoint if there is one.
        `address` means nothing to a cluster of one rank."""
        device = mesh.device_for(self.facts.device, self.rank)
        self._settle_numerics()
        self.group = mesh.join(address, self._store, self.rank, self.world, device)
        self.model = build(self.run.model, self.run.seed, self.group, self.run.precision)
        self.batch = self.agreement.members[self.cluster].batch
        self.inner = Inner(
            model=self.model,
            forward=forward_of(self.model, self.run.precision),
            objective=LM(),
            optimizer=optim.optimizer(self.run.optimizer, self.model),
            cfg=self.run.optimizer,
            group=self.group,
            tokens=self.batch * self.run.data.seq_len,
        )
        self.exchange = Exchange(self.model, self.run, self.group)
        self.data = open_data(self.agreement, self.cluster, self.tokenizer, self.cache)
        held = self._restore()
        return StartReport(
            held={fragment: held.get(fragment, 0) for fragment in self.exchange.fragments},
            lanes={fragment: self.exchange.lanes(fragment) for fragment in self.exchange.fragments},
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            device=str(device),
        )

    def train(self, steps: Steps) -> Report:
        """Take inner steps. The same report on every rank. The learning rate follows the rounds, however many inner
        steps each of them takes."""
        assert 0 < steps.count <= steps.total - steps.first, f"{steps}"
        begun = time.perf_counter()
        whole_run = self.run.rounds * self.run.inner_steps
        loss_sum = 0.0
        for i in range(steps.first, steps.first + steps.count):
            windows_BT1 = self.data.batch(steps.position + i, self.rank, self.world)
            rate = optim.rate(self.run.optimizer, (steps.round + i / steps.total) * self.run.inner_steps, whole_run)
            where = f"round {steps.round}, step {i} of {steps.total}"
            loss_sum += inner_step(self.inner, windows_BT1, rate, where)
        tokens = steps.count * self.inner.tokens
        seconds = self.group.most(time.perf_counter() - begun)
        return Report(steps=steps.count, tokens=tokens, loss=loss_sum / tokens, seconds=seconds)

    def evaluate(self, index: int, count: int) -> Evaluation:
        """The current parameters on held-out windows `index`, `index + count`, …: sums over the cluster."""
        windows_NT1 = self.data.eval(index, count, self.rank, self.world)
        return evaluate(self.inner, windows_NT1, max(1, self.batch // self.world))

    def encode(self, fragment: str) -> bytes:
        """This rank's packet of base − local. Calling it again before `apply` or `adopt` gives the same bytes."""
        return self.exchange.encode(fragment)

    def apply(self, fragment: str, payload: bytes, merged: bool) -> dict[str, Lanes]:
        """Add an update to the global parameters and restart from them. Returns this rank's parts of the digest."""
        return self.exchange.apply(fragment, payload, merged=merged)

    def adopt(self, fragment: str, payload: bytes) -> dict[str, Lanes]:
        """Replace the global parameters and restart from them. Returns this rank's parts of the digest."""
        return self.exchange.adopt(fragment, payload)

    def save(self, tag: int, held: Mapping[str, tuple[int, str]]) -> None:
        """Write checkpoint `tag`: everything an exact resume needs. `held`: version and digest by fragment."""
        note: dict[str, Json] = {"held": {name: list(value) for name, value in held.items()}, "model": self._identity()}
        dcp.save(self.checkpoints, tag, self._state() | self._generators(), note)

    def stop(self) -> None:
        """Leave the group. Collective."""
        self.group.leave()

    def _restore(self) -> dict[str, int]:
        """Fill everything from the newest intact checkpoint. Returns the versions it holds, none without one."""
        found = dcp.newest(self.checkpoints)
        if found is None:
            return {}
        if found.note["model"] != self._identity():
            raise UsageError(
                f"{found.path}: this checkpoint belongs to another model or seed",
                hint="choose another --out, or move the old run's folder away",
            )
        state = self._state()
        # Generators belong to ranks: another number of ranks has none to go on with and keeps the seeded ones.
        generators = self._generators() if found.world == self.world else {}
        dcp.load(found, state | generators)
        self.exchange.restore(state)
        for key, value in generators.items():
            (torch.cuda.set_rng_state if key.startswith("rng-cuda") else torch.set_rng_state)(value)
        return {fragment: int(version) for fragment, (version, _) in found.note["held"].items()}

    def _state(self) -> dict[str, Tensor]:
        """Everything but the generators, by name; all but the residuals share storage with what they describe."""
        parameters = {f"parameter/{name}": value.detach() for name, value in self.model.named_parameters()}
        moments = optim.state_of(self.inner.optimizer, self.model)
        return parameters | {f"optimizer/{key}": value for key, value in moments.items()} | self.exchange.state()

    def _generators(self) -> dict[str, Tensor]:
        generators = {f"rng/{self.rank}": torch.get_rng_state()}
        if self.group.device.type == "cuda":
            generators[f"rng-cuda/{self.rank}"] = torch.cuda.get_rng_state()
        return generators

    def _identity(self) -> dict[str, Json]:
        return {"seed": self.run.seed, **self.run.model.model_dump(mode="json")}

    def _settle_numerics(self) -> None:
        """The same bits from the same state, or an exact resume would be luck."""
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, at its first use
        torch.set_num_threads(self.facts.threads)
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.manual_seed(self.run.seed + self.rank)
