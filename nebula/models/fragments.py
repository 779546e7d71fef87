"""Which parameters synchronise together. No torch here: the coordinator asks too."""

from __future__ import annotations

from collections.abc import Sequence


def fragments(names: Sequence[str], layers: int, count: int) -> dict[str, tuple[str, ...]]:
    """Split parameters, named in model order, into `count` fragments "f0", "f1", …: block l goes to fragment
    l mod `count` (strided, as in Streaming DiLoCo, arXiv 2501.18512, section 2.2), the embedding to the first, final
    norm and head to the last. Every name is in exactly one fragment, in the order given."""
    assert 1 <= count <= layers
    parts: list[list[str]] = [[] for _ in range(count)]
    for name in names:
        parts[_part(name, layers, count)].append(name)
    return {f"f{i}": tuple(part) for i, part in enumerate(parts)}


def _part(name: str, layers: int, count: int) -> int:
    top, *rest = name.split(".")
    match top:
        case "embed":
            return 0
        case "norm" | "head":
            return count - 1
        case "blocks":
            layer = int(rest[0])
            assert layer < layers, f"{name} is beyond {layers} layers"
            return layer % count
    raise AssertionError(f"{name} is no parameter of nebula.models.Transformer")
