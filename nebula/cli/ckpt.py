"""`nebula ckpt`: a run's checkpoints, and its global model as one file that needs no Nebula run around it.

An exported model is a safetensors file. Its metadata keys "nebula.agreement" and "nebula.tokenizer" hold the canonical
JSON of the agreement and the JSON of the tokenizer, "nebula.version" and "nebula.digest" say which commit it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nebula import files
from nebula.cli import output
from nebula.cli.rundir import RunDir
from nebula.config import Agreement
from nebula.errors import UsageError
from nebula.metrics import events, units

if TYPE_CHECKING:
    from torch import Tensor

command = typer.Typer(help="List a run's checkpoints; export its model as one file.", add_completion=False)

FOREIGN = "give a run's folder, or a file that `nebula ckpt export` wrote"


@command.command("list")
def list_checkpoints(
    run_dir: Annotated[Path, typer.Argument(help="A run's folder, such as runs/code-moe.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show which commit the global model is at, and the checkpoints of the clusters."""
    agreement = RunDir(run_dir).agreement()
    version = _version(RunDir(run_dir).events)
    found = [_describe(note.parent, run_dir) for note in sorted(run_dir.rglob("[0-9]*/state.json"))]
    rows = [("global model", f"version {version} of {agreement.run.rounds}")]
    rows += [(c["path"], f"before round {c['round'] + 1}, {units.size(c['bytes'])}") for c in found]
    fields = {"version": version, "checkpoints": found}
    output.result("ckpt", fields, text=output.aligned(rows), next=f"nebula ckpt export {run_dir}", as_json=json)


@command.command("export")
def export(
    run_dir: Annotated[Path, typer.Argument(help="A run's folder, such as runs/code-moe.")],
    out: Annotated[Path | None, typer.Option(help="Default: model.safetensors in the run's folder.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write the global model, its config and its tokenizer as one safetensors file."""
    target = out or run_dir / "model.safetensors"
    model = from_run(run_dir)
    try:
        files.write(target, pack(model))
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror}", hint="choose another place with --out") from error
    size = target.stat().st_size
    fields = {"path": str(target), "bytes": size, **model.info}
    output.result("ckpt", fields, text=f"{target} ({units.size(size)})", next=f"nebula sample {target}", as_json=json)


def _describe(checkpoint: Path, run_dir: Path) -> dict[str, Any]:
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    return {"path": str(checkpoint.relative_to(run_dir)), "round": int(checkpoint.name), "bytes": size}


def _version(log: Path) -> int:
    """How many rounds every fragment has committed."""
    kept = events.read(log) if log.exists() else iter(())
    versions = {e["fragment"]: int(e["version"]) for e in kept if e["event"] == "commit"}
    return min(versions.values(), default=0)


# --- the model as a value -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """Whole fp32 parameters by name, and what it takes to use them. `info`: version and digest of the commit."""

    agreement: Agreement
    tokenizer: str
    tensors: Mapping[str, Tensor]
    info: Mapping[str, str]


def load_model(path: Path) -> TrainedModel:
    """From a run's folder or an exported file. Raises UsageError if it is neither, or damaged."""
    if not path.exists():
        raise UsageError(f"no such checkpoint: {path}", hint=FOREIGN)
    model = from_run(path) if path.is_dir() else from_file(path)
    return _checked(model, path)


def from_run(run_dir: Path) -> TrainedModel:
    run = RunDir(run_dir)
    agreement, tokenizer = run.agreement(), run.tokenizer()
    from nebula.federation.restore import load_global  # torch only once the folder is known to be a run's

    tensors, info = load_global(run.journal, agreement)
    return TrainedModel(agreement, tokenizer, tensors, {key: str(value) for key, value in info.items()})


def from_file(path: Path) -> TrainedModel:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UsageError(f"not a safetensors file, or damaged ({path}): {error}", hint=FOREIGN) from error
    try:
        agreement, tokenizer = Agreement.parse(metadata["nebula.agreement"].encode()), metadata["nebula.tokenizer"]
    except (KeyError, ValueError) as error:
        raise UsageError(f"not a model that Nebula wrote ({path}): no agreement in it", hint=FOREIGN) from error
    info = {key: metadata.get(f"nebula.{key}", "") for key in ("version", "digest")}
    return TrainedModel(agreement, tokenizer, tensors, info)


def pack(model: TrainedModel) -> bytes:
    """The bytes of an exported file."""
    from safetensors.torch import save

    metadata = {"nebula.agreement": model.agreement.canonical().decode(), "nebula.tokenizer": model.tokenizer}
    metadata |= {f"nebula.{key}": value for key, value in model.info.items()}
    return bytes(save({name: tensor.contiguous() for name, tensor in model.tensors.items()}, metadata=metadata))


def _checked(model: TrainedModel, path: Path) -> TrainedModel:
    """Parameters and tokenizer are those of the agreement."""
    from nebula.models.init import parameter_shapes

    expected, found = parameter_shapes(model.agreement.run.model), model.tensors
    wrong = [name for name in {**expected, **found} if expected.get(name) != _shape(found.get(name))]
    if wrong:
        message = f"damaged checkpoint ({path}): {len(wrong)} parameters do not fit its config, such as {wrong[0]!r}"
        raise UsageError(message, hint="export it again")
    if model.agreement.tokenizer.removeprefix("sha256:") != hashlib.sha256(model.tokenizer.encode()).hexdigest():
        raise UsageError(f"damaged checkpoint ({path}): its tokenizer is another one", hint="export it again")
    return model


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)
