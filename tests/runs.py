"""Run folders as a coordinator leaves them, without a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from nebula.config import Agreement, Cluster, Data, Federation, Model, Run, agree
from nebula.metrics.events import EventLog

PARAMS = 1_000_000
TINY = Model(vocab=300, layers=2, dim=16, heads=2, kv_heads=2, ffn_dim=16, experts=2, top_k=1)


def make_agreement(tokenizer: str = "") -> Agreement:
    federation = Federation(clusters={"north": Cluster(ranks=2), "south": Cluster()})
    run = Run(name="toy", rounds=6, model=TINY, data=Data(seq_len=16))
    digest = "sha256:" + hashlib.sha256(tokenizer.encode()).hexdigest()
    return agree(run, federation, tokenizer=digest, unigram_entropy=5.1)


def make_run(
    parent: Path,
    rounds: int,
    state: str | None = "completed",
    loss: Callable[[int], float] = lambda r: 5.0 - 0.25 * r,
    tokenizer: str = "",
) -> Path:
    """`parent/toy` after `rounds` rounds of a second each; a delta is one byte where fp32 has eight."""
    folder = parent / "toy"
    folder.mkdir()
    agreement = make_agreement(tokenizer)
    described = {"schema": 1, "digest": agreement.digest(), "agreement": json.loads(agreement.canonical())}
    (folder / "run.json").write_text(json.dumps(described))
    (folder / "tokenizer.json").write_text(tokenizer)
    now = [1000.0]
    log = EventLog(folder / "events.jsonl", clock=lambda: now[0])
    log.emit("run_started", **started())
    for r in range(rounds):
        now[0] += 1
        for name in ("north", "south"):
            for fragment in ("0", "1"):
                log.emit("delta", cluster=name, round=r, fragment=fragment, bytes=PARAMS // 4, seconds=0.1)
                log.emit("commit", round=r, fragment=fragment, version=r + 1, digest="sha256:0")
        if r % 2 == 0:
            log.emit("eval", round=r, loss=loss(r) + 0.5, tokens_trained=300 * r, eval_tokens=64)
        log.emit("round", **round_closed(r, loss(r)))
    if state is not None:
        log.emit("run_ended", state=state)
        (folder / "summary.json").write_text(json.dumps({"schema": 1, "run": "toy", "state": state}))
    log.close()
    return folder


def started() -> dict[str, object]:
    return {
        "run": "toy",
        "digest": "sha256:0",
        "params": PARAMS,
        "clusters": ["north", "south"],
        "rounds": 6,
        "inner_steps": 20,
        "fragments": 2,
        "unigram_entropy": 5.1,
        "member_tokens": {"north": 200, "south": 100},
    }


def round_closed(r: int, loss: float) -> dict[str, object]:
    shares = {
        "north": share(loss, 200, 0.8, 0.2, (r + 1) * 600_000),
        "south": share(loss, 100, 0.5, 0.5, (r + 1) * 500_000),
    }
    return {"round": r, "digest": f"sha256:{r:064x}", "tokens": 300 * (r + 1), "loss": loss, "clusters": shares}


def share(loss: float, tokens: int, compute: float, stall: float, up_counter: int) -> dict[str, object]:
    """Byte counters count from the agent's start."""
    return {
        "loss": loss,
        "tokens": tokens,
        "compute_s": compute,
        "stall_s": stall,
        "up_bytes": up_counter,
        "down_bytes": up_counter // 2,
        "retries": 0,
        "rtt_s": 0.05,
    }
