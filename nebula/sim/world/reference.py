"""What a run comes to if nothing goes wrong: the same arithmetic without agents, journal, network or time."""

from __future__ import annotations

from nebula.checkpoint.ledger import Ledger
from nebula.clock import REAL
from nebula.config import Agreement
from nebula.federation.events import Arrived, Merge
from nebula.federation.merge import Merger
from nebula.sim.world.rank import Memory
from nebula.sim.world.witness import Blobs
from nebula.wan.digest import global_digest


def undisturbed(agreement: Agreement) -> str:
    """Digest of the final model if every cluster takes part in every round."""
    run, ledger = agreement.run, Ledger(Blobs())
    merger = Merger(agreement, ledger, REAL)
    digests = {commit.fragment: commit.digest for commit in merger.found()}
    ranks = {cluster: Memory(agreement, cluster) for cluster in sorted(agreement.members)}
    for round in range(run.rounds):
        for rank in ranks.values():
            for step in range(run.inner_steps):
                rank.inner_step(round * run.inner_steps + step)
        for fragment in digests:
            arrivals = tuple(
                _arrived(agreement, cluster, fragment, round, rank.encode(fragment), ledger)
                for cluster, rank in ranks.items()
            )
            commit = merger.merge(Merge(fragment, round + 1, arrivals))
            update = ledger.get(commit.blobs["update"])
            digests[fragment] = commit.digest
            for cluster, rank in ranks.items():
                digest = rank.apply(fragment, "update", update, merged=True)
                assert digest == commit.digest, f"{cluster} comes to {digest}, the coordinator to {commit.digest}"
    return global_digest(digests)


def _arrived(agreement: Agreement, cluster: str, fragment: str, round: int, packet: bytes, ledger: Ledger) -> Arrived:
    return Arrived(
        cluster=cluster,
        fragment=fragment,
        round=round,
        weight=float(agreement.tokens_per_round(cluster)),
        blob=ledger.put(packet),
        parts=(len(packet),),
        seconds=None,
    )
