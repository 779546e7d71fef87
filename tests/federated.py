"""Whole runs in one process: real coordinator, journal, sealing, codec and ranks; only sockets and Ray are left out."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nebula.checkpoint.ledger import Ledger
from nebula.checkpoint.store import Folder
from nebula.config import Agreement, Cluster, Data, Federation, Model, Run, agree
from nebula.data.open import open_data
from nebula.data.prepare import prepare
from nebula.federation.agent import Agent
from nebula.federation.hub import Hub
from nebula.federation.journal import open_journal
from nebula.federation.memory import MemoryStub
from nebula.metrics.events import EventLog, read
from nebula.models.init import initial, parameter_shapes
from nebula.models.transformer import Transformer
from nebula.runtime.engine import GroupEngine, Ranks
from nebula.runtime.gateway import Gateway
from nebula.runtime.local import launch
from nebula.security.pki import Identity, throwaway
from nebula.wan.transport import TLS_NAME

WORDS = ["def", "class", "return", "import", "from", "self", "yield", "while", "for", "if", "else", "raise", "none"]

TINY = Model(
    vocab=256 + 64, layers=2, dim=32, heads=2, kv_heads=2, ffn_dim=32, experts=4, top_k=2, dense_layers=1, aux_loss=0.0
)


def write_corpus(folder: Path, files: int = 24, words: int = 1500) -> Path:
    """Text that can be learnt a little, the same every time."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        state, text = number + 1, []
        for _ in range(words):
            state = (state * 1103515245 + 12345) % 2**31
            text.append(WORDS[(state >> 16) % len(WORDS)])
        (folder / f"module{number}.py").write_text(" ".join(text))
    return folder


def tiny(corpus: Path, **changes: Any) -> Run:
    data = Data(path=str(corpus), seq_len=32, held_out=0.1, eval_windows=8, **changes.pop("data", {}))
    values = {"name": "tiny", "model": TINY, "data": data, "rounds": 3, "inner_steps": 3, "fragments": 2, "batch": 2}
    return Run(**{**values, **changes})


@dataclass
class Federated:
    """A federation on disk in `folder`, of which coordinator and clusters can be started and dropped at will."""

    run: Run
    federation: Federation
    folder: Path
    cache: Path
    agreement: Agreement = field(init=False)
    hub: Hub = field(init=False)

    def __post_init__(self) -> None:
        data = prepare(self.run.data, self.run.model.vocab, sorted(self.federation.clusters), self.cache)
        self.tokenizer = data.tokenizer
        digest = "sha256:" + hashlib.sha256(data.tokenizer.encode()).hexdigest()
        self.agreement = agree(self.run, self.federation, tokenizer=digest, unigram_entropy=data.unigram_entropy)
        throwaway(self.folder / "pki", list(self.federation.clusters), [TLS_NAME])
        self.start_hub()

    def start_hub(self) -> Hub:
        """A coordinator on the journal of the last one, if there was one."""
        identity = Identity.load(self.folder / "pki" / "coordinator")
        log = EventLog(self.folder / "events.jsonl")
        journal = open_journal(self.folder / "journal" / "journal.sqlite", agreement=self.agreement.digest())
        ledger = Ledger(Folder(self.folder / "journal" / "blobs"))
        self.hub = Hub(self.agreement, self.tokenizer.encode(), identity, journal, ledger, log.emit)
        return self.hub

    def gateway(self, cluster: str, **changes: Any) -> Gateway:
        settings = {
            "identity": str(self.folder / "pki" / cluster),
            "address": "127.0.0.1:1",
            "cluster": cluster,
            "agreement": self.agreement.digest(),
            "max_stall": 20.0,
            "stub": MemoryStub(self.hub),
        }
        return Gateway(**{**settings, **changes})

    def engine(self, cluster: str) -> GroupEngine:
        facts = self.federation.clusters[cluster]
        settings = {
            "agreement": self.agreement.canonical(),
            "tokenizer": self.tokenizer.encode(),
            "cluster": cluster,
            "facts": facts.model_dump_json().encode(),
            "checkpoints": str(self.folder / "checkpoints" / cluster),
            "cache": str(self.cache),
        }
        return GroupEngine(lambda: launch(Ranks(count=facts.ranks, settings=settings)))

    def agent(self, cluster: str, gateway: Any = None, engine: Any = None) -> Agent:
        gateway = gateway or self.gateway(cluster)
        gateway.join()
        log = EventLog(self.folder / "clusters" / cluster / "events.jsonl")
        return Agent(
            cluster=cluster,
            engine=engine or self.engine(cluster),
            transport=gateway,
            emit=log.emit,
            checkpoint_every=self.run.checkpoint_every,
        )

    def finish(self, agents: Mapping[str, Agent] | None = None) -> dict[str, Any]:
        """Run every cluster to the end in a thread of its own. Returns the summary."""
        agents = agents or {name: self.agent(name) for name in self.federation.clusters}
        run_together({name: agent.run for name, agent in agents.items()})
        state = self.hub.ended()
        assert state is not None
        summary = self.hub.tally.summary(run=self.run.name, state=state, global_digest=self.hub.global_digest())
        return {**summary, "held": {name: agent.held for name, agent in agents.items()}}

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read(self.folder / "events.jsonl") if event["event"] == kind]


def run_together(acts: Mapping[str, Callable[[], object]]) -> None:
    """Each in a thread. The first error is raised here at once; who waited for the one that failed is left behind."""
    ends: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def act(name: str) -> None:
        try:
            acts[name]()
            ends.put(None)
        except BaseException as error:
            ends.put(error)

    for name in acts:
        threading.Thread(target=act, args=(name,), name=name, daemon=True).start()
    for _ in acts:
        if (error := ends.get()) is not None:
            raise error


def one_process(agreement: Agreement, tokenizer: str, cache: Path) -> dict[str, torch.Tensor]:
    """What data parallelism comes to: a plain torch loop over the full global batch, nothing of Nebula's in it but
    model, initial values and data."""
    run = agreement.run
    model = Transformer(run.model)
    with torch.no_grad():
        for name, shape in parameter_shapes(run.model).items():
            model.get_parameter(name).copy_(initial(name, shape, run.model, run.seed))
    data = {name: open_data(agreement, name, tokenizer, cache) for name in sorted(agreement.members)}
    optimizer = torch.optim.SGD(model.parameters(), lr=run.optimizer.lr)
    for step in range(run.rounds):
        windows = torch.cat([part.batch(step, 0, 1) for part in data.values()])
        logits, _ = model(windows[:, :-1])
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def clusters(**ranks: int) -> Federation:
    return Federation(clusters={name: Cluster(ranks=count, device="cpu") for name, count in ranks.items()})
