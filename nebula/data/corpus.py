"""Where text comes from: documents on disk, the held-out set, and each cluster's share.

Everything is decided by names relative to what the recipe says, never by absolute paths or the order a file system
lists them in: two machines that hold the same files agree without talking.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nebula.config import Data
from nebula.errors import UsageError

PIECE = 64 * 1024
"""Files of more bytes are cut, at line ends, so that one big file also splits among clusters."""

BALANCE = 0.2
"""Members' shares may differ by this much of the mean before units are taken apart."""

_FOREIGN = frozenset({"site-packages", "dist-packages", "__pycache__", "lib2to3"})


@dataclass(frozen=True, slots=True)
class Document:
    """A file, or the piece of it from byte `start` to `end`. `name`: its path relative to the recipe's, with "/"."""

    path: Path
    name: str
    start: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.start

    def read(self) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.bytes).decode("utf-8", errors="replace")

    def unit(self, depth: int) -> str:
        """What it belongs to, `depth` folders down: the top-level module or folder at 1; at last, itself."""
        parts = self.name.split("/")
        return "/".join(parts[:depth]) if depth <= len(parts) else f"{self.name}\0{self.start}"


@dataclass(frozen=True, slots=True)
class Split:
    """No document is both held out and in somebody's training set."""

    held_out: tuple[Document, ...]
    train: Mapping[str, tuple[Document, ...]]


def digest(document: Document, purpose: str) -> bytes:
    """Puts documents into an order that depends on their names alone, another one for each purpose."""
    return hashlib.sha256(os.fsencode(f"{purpose}\0{document.name}\0{document.start}")).digest()


# --- finding ------------------------------------------------------------------------------------------------------


def find(cfg: Data) -> tuple[Document, ...]:
    """Every document of `cfg.path`, sorted by name. Raises UsageError where there is nothing to read."""
    files = dict(sorted(_stdlib() if cfg.path == "stdlib" else _named(cfg)))
    documents = tuple(document for name, path in files.items() for document in _pieces(path, name))
    if not documents:
        raise UsageError(
            f"data.path {cfg.path!r}: found no text ({len(files)} files with {', '.join(cfg.suffixes)}, all empty)",
            hint="point data.path at a folder or file with text, or add its suffix to data.suffixes",
        )
    return documents


def _stdlib() -> Iterator[tuple[str, Path]]:
    """The sources of this interpreter's standard library, without the few test files that are not UTF-8."""
    root = Path(sysconfig.get_path("stdlib"))
    return ((name, path) for name, path in _walk(root, (".py",)) if _is_utf8(path))


def _named(cfg: Data) -> Iterator[tuple[str, Path]]:
    paths = (cfg.path,) if isinstance(cfg.path, str) else cfg.path
    for i, name in enumerate(paths):
        # Two folders of a list may hold files of one name, and their own names may differ between machines.
        prefix = f"{i}/" if len(paths) > 1 else ""
        root = Path(name).expanduser()
        if root.is_file():
            yield prefix + root.name, root
        elif root.is_dir():
            yield from ((prefix + inner, path) for inner, path in _walk(root, cfg.suffixes))
        else:
            raise UsageError(
                f"data.path {name!r}: no such file or folder on this machine",
                hint='correct data.path in the recipe, or use "stdlib", which every machine has',
            )


def _walk(root: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in _FOREIGN and not f.startswith(".")]
        for file in files:
            if file.endswith(suffixes) and not file.startswith("."):
                path = Path(folder, file)
                yield path.relative_to(root).as_posix(), path


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _pieces(path: Path, name: str) -> Iterator[Document]:
    size = path.stat().st_size
    start = 0
    with path.open("rb") as file:
        while start < size:
            end = size
            if size - start > PIECE:
                file.seek(start + PIECE)
                file.readline()
                end = file.tell()
            yield Document(path, name, start, end)
            start = end


# --- splitting ----------------------------------------------------------------------------------------------------


def split(documents: Sequence[Document], cfg: Data, members: Sequence[str]) -> Split:
    """Hold out `cfg.held_out` of the bytes and give the rest to the members: by "documents" a fair share each, by
    "batch" all of it to everyone. Raises UsageError where somebody would get nothing."""
    shares = len(members) if cfg.partition == "documents" else 1
    if len(documents) <= shares:
        raise UsageError(
            f"data.path {cfg.path!r}: {len(documents)} documents of {_bytes(documents)} bytes in all are too few: "
            f"{shares} for training and 1 held out are needed",
            hint=f"files are cut every {PIECE // 1024} KiB: add files or text, use fewer clusters, or set "
            'data.partition = "batch"',
        )
    held_out = _held_out(documents, cfg.held_out, most=len(documents) - shares)
    rest = sorted(set(documents) - held_out, key=_place)
    everyone = dict.fromkeys(sorted(members), tuple(rest))
    train = everyone if cfg.partition == "batch" else _shares(rest, sorted(members))
    return Split(tuple(sorted(held_out, key=_place)), train)


def _place(document: Document) -> tuple[str, int]:
    return document.name, document.start


def _held_out(documents: Sequence[Document], share: float, *, most: int) -> set[Document]:
    """The first by hash, until they hold their share of the bytes: at least one, at most `most`."""
    wanted = share * _bytes(documents)
    chosen: set[Document] = set()
    for document in sorted(documents, key=lambda d: digest(d, "held out"))[:most]:
        if chosen and wanted <= 0:
            break
        chosen.add(document)
        wanted -= document.bytes
    return chosen


def _shares(documents: Sequence[Document], members: Sequence[str]) -> dict[str, tuple[Document, ...]]:
    """Units go, largest first, to whoever has least. While that is not balanced, the largest unit that can be taken
    apart is, so that only as few files as needed leave their module's others."""
    units = _group(documents, 1)
    while True:
        shares = _greedy(units, members)
        sizes = [sum(_bytes(units[key]) for key in keys) for keys in shares.values()]
        large = max(
            (k for k, unit in units.items() if len(unit) > 1), key=lambda k: (_bytes(units[k]), k), default=None
        )
        fair = max(sizes) - min(sizes) <= BALANCE * sum(sizes) / len(sizes)
        if (fair and min(sizes) > 0) or large is None:
            break
        units |= _apart(units.pop(large))
    return {m: tuple(sorted((d for k in keys for d in units[k]), key=_place)) for m, keys in shares.items()}


def _bytes(documents: Sequence[Document]) -> int:
    return sum(document.bytes for document in documents)


def _group(documents: Sequence[Document], depth: int) -> dict[str, list[Document]]:
    groups: dict[str, list[Document]] = {}
    for document in documents:
        groups.setdefault(document.unit(depth), []).append(document)
    return groups


def _apart(unit: Sequence[Document]) -> dict[str, list[Document]]:
    """The unit's parts, at the first depth where it has more than one."""
    depth = 1
    while len(parts := _group(unit, depth)) == 1:
        depth += 1
    return parts


def _greedy(units: Mapping[str, Sequence[Document]], members: Sequence[str]) -> dict[str, list[str]]:
    shares: dict[str, list[str]] = {member: [] for member in members}
    load = dict.fromkeys(members, 0)
    for key in sorted(units, key=lambda k: (-_bytes(units[k]), k)):
        member = min(members, key=lambda m: (load[m], m))
        shares[member].append(key)
        load[member] += _bytes(units[key])
    return shares
