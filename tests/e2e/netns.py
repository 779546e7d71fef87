"""A star of network namespaces: a hub and one site per cluster, each at the end of a veth of its own. The kernel drops
packets there as told, by nftables."""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

HUB = "hub"


class Star:
    """`sites` are named as the interfaces that lead there. Packets are dropped where they come in, so that whoever
    sends them cannot tell."""

    def __init__(self, sites: Sequence[str]) -> None:
        self._prefix = f"nebula-{uuid.uuid4().hex[:8]}"
        self._sites = list(sites)

    def within(self, place: str) -> tuple[str, ...]:
        """What to put before a command so that it runs at the hub or a site, as the process that is started."""
        return ("ip", "netns", "exec", self._name(place))

    def hub_as_seen_from(self, site: str) -> str:
        return f"10.77.{self._sites.index(site)}.1"

    def lose(self, site: str, *, up: float = 0.0, down: float = 0.0) -> None:
        """Drop this share of a site's packets from now on, 1 being all, and count them anew."""
        self._filter(site, HUB, site, up)
        self._filter(site, site, HUB, down)

    def dropped(self, site: str) -> int:
        """Packets, both ways, since the last `lose`."""
        return self._count(site, HUB) + self._count(site, site)

    def build(self, stack: ExitStack) -> None:
        for place in (HUB, *self._sites):
            _run("ip", "netns", "add", self._name(place))
            stack.callback(_run, "ip", "netns", "delete", self._name(place))
            self._ip(place, "link", "set", "lo", "up")
        for site in self._sites:
            hub = self.hub_as_seen_from(site)
            self._ip(HUB, "link", "add", site, "type", "veth", "peer", "name", HUB, "netns", self._name(site))
            for place, interface, address in ((HUB, site, hub), (site, HUB, f"{hub[:-1]}2")):
                self._ip(place, "address", "add", f"{address}/24", "dev", interface)
                self._ip(place, "link", "set", interface, "up")

    def _filter(self, site: str, place: str, source: str, share: float) -> None:
        rule = f'iifname "{source}" numgen random mod 1000 <= {round(1000 * share) - 1} counter drop'
        table = f"table ip {site}"
        chain = f"chain incoming {{\ntype filter hook input priority 0\n{rule if share else ''}\n}}"
        self._nft(place, "-f", "-", stdin=f"{table}\ndelete {table}\n{table} {{\n{chain}\n}}\n")  # at one stroke

    def _count(self, site: str, place: str) -> int:
        listing = json.loads(self._nft(place, "--json", "list", "table", "ip", site))["nftables"]
        expressions = [part for entry in listing for part in entry.get("rule", {}).get("expr", [])]
        return sum(part["counter"]["packets"] for part in expressions if "counter" in part)

    def _ip(self, place: str, *arguments: str) -> None:
        _run("ip", "-n", self._name(place), *arguments)

    def _nft(self, place: str, *arguments: str, stdin: str = "") -> str:
        return _run(*self.within(place), "nft", *arguments, stdin=stdin)

    def _name(self, place: str) -> str:
        return f"{self._prefix}-{place}"


@contextmanager
def star(*sites: str) -> Iterator[Star]:
    with ExitStack() as stack:
        network = Star(sites)
        network.build(stack)
        yield network


def _run(*command: str, stdin: str = "") -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout
