"""`nebula ckpt`: a run's checkpoints, and its global model as one file that needs no Nebula run around it.

An exported model is a safetensors file. Its metadata keys "nebula.agreement" and "nebula.tokenizer" hold the canonical
JSON of the agreement and the JSON of the tokenizer, "nebula.version" and "nebula.digest" say which commit it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nebula import files
from nebula.cli import output
from nebula.cli.rundir import RunDir
from nebula.config import Agreement
from nebula.errors import NebulaError, PreflightError, UnreachableError, UsageError
from nebula.metrics import events, units

if TYPE_CHECKING:
    from torch import Tensor

    from nebula.federation.audit import Finding

command = typer.Typer(help="List and verify a run's checkpoints; export its model as one file.", add_completion=False)

FOREIGN = "give a run's folder, or a file that `nebula ckpt export` wrote"
DAMAGED = (
    "`nebula resume` goes on from what is left: a cluster from the checkpoint before, the coordinator from the version "
    "before, which it merges again"
)

RunFolder = Annotated[Path, typer.Argument(help="A run's folder, such as runs/code-moe.")]
Journal = Annotated[str, typer.Option(help="postgresql://… if the coordinator was told so; default: in the folder.")]
Blobs = Annotated[str, typer.Option(help="fsspec URL if the coordinator was told so; default: in the folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@command.command("list")
def list_checkpoints(run_dir: RunFolder, json: AsJson = False) -> None:
    """Show which commit the global model is at, and the checkpoints of every cluster, wherever it keeps them."""
    run = RunDir(run_dir)
    agreement = run.agreement()
    version = _version(run.events)
    found = [c for cluster, where in _places(run).items() for c in _described(cluster, where, run_dir)]
    rows = [("global model", f"version {version} of {agreement.run.rounds}")]
    rows += [(c["path"], f"before round {c['round'] + 1}, {units.size(c['bytes'])}") for c in found]
    fields = {"version": version, "checkpoints": found}
    output.result("ckpt", fields, text=output.aligned(rows), next=f"nebula ckpt verify {run_dir}", as_json=json)


@command.command("verify")
def verify(run_dir: RunFolder, journal: Journal = "", blobs: Blobs = "", json: AsJson = False) -> None:
    """Check everything that the run would go on from: the coordinator's journal, the content of its blobs, the digest
    of the global model, and every file of every cluster's checkpoints. Changes nothing; exit code 1 if something is
    damaged. The run must be at rest."""
    from nebula.federation.audit import audit

    run = RunDir(run_dir)
    agreement, places = run.agreement(), _places(run)
    findings = list(audit(run.journal, agreement, journal, blobs))
    for where in places.values():
        findings += _audited(where, run_dir)
    faults = [finding for finding in findings if finding.fault]
    fields = {"intact": not faults, "findings": [asdict(finding) for finding in findings]}
    if faults and json:
        print(output.envelope("ckpt", ok=False, **fields))
        raise typer.Exit(NebulaError.exit_code)
    rows = [(f"{'WRONG' if f.fault else 'ok':<5}  {f.what}", f.fault or f.found) for f in findings]
    following = "" if faults else f"nebula ckpt export {run_dir}"
    output.result("ckpt", fields, text=output.aligned(rows), next=following, as_json=json)
    if faults:
        raise NebulaError(f"{len(faults)} of {len(findings)} are not as they were written", hint=DAMAGED)


@command.command("export")
def export(
    run_dir: RunFolder,
    out: Annotated[Path | None, typer.Option(help="Default: model.safetensors in the run's folder.")] = None,
    journal: Journal = "",
    blobs: Blobs = "",
    json: AsJson = False,
) -> None:
    """Write the global model, its config and its tokenizer as one safetensors file."""
    target = out or run_dir / "model.safetensors"
    model = from_run(run_dir, journal, blobs)
    try:
        files.write(target, pack(model))
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror}", hint="choose another place with --out") from error
    size = target.stat().st_size
    fields = {"path": str(target), "bytes": size, **model.info}
    output.result("ckpt", fields, text=f"{target} ({units.size(size)})", next=f"nebula sample {target}", as_json=json)


def _version(log: Path) -> int:
    """How many rounds every fragment has committed."""
    kept = events.read(log) if log.exists() else iter(())
    versions = {e["fragment"]: int(e["version"]) for e in kept if e["event"] == "commit"}
    return min(versions.values(), default=0)


# --- checkpoints of clusters --------------------------------------------------------------------------------------


def _places(run: RunDir) -> dict[str, str]:
    """Where each cluster keeps its checkpoints."""
    return {name: c.checkpoints or str(run.checkpoints / name) for name, c in run.federation().clusters.items()}


def _described(cluster: str, where: str, run_dir: Path) -> Iterator[dict[str, Any]]:
    """A cluster's whole checkpoints, oldest first."""
    from nebula.checkpoint.place import NOTE, Place

    place = Place(where)
    try:
        for tag in reversed(place.tags()):
            if place.exists(tag, NOTE):
                path = _within(place.name(tag), run_dir)
                yield {"cluster": cluster, "path": path, "round": tag, "bytes": place.size(tag)}
    except ConnectionError as error:
        raise UnreachableError(
            f"the checkpoints of {cluster} cannot be listed: {error}", hint="check the URL and its credentials"
        ) from error


def _audited(where: str, run_dir: Path) -> Iterator[Finding]:
    """A row for each of a cluster's checkpoints; one for the place if it cannot be looked into."""
    from nebula.checkpoint.bucket import shown
    from nebula.checkpoint.dcp import audit
    from nebula.federation.audit import Finding

    try:
        for name, fault in audit(where):
            yield Finding(_within(name, run_dir), "all files as written", fault)
    except (UsageError, PreflightError) as error:
        yield Finding(_within(shown(where), run_dir), "", f"{error.message} ({error.hint})")


def _within(path: str, run_dir: Path) -> str:
    """Relative to the run's folder, if it is in there."""
    return path.removeprefix(f"{run_dir}/")


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


def from_run(run_dir: Path, journal: str = "", blobs: str = "") -> TrainedModel:
    run = RunDir(run_dir)
    agreement, tokenizer = run.agreement(), run.tokenizer()
    from nebula.federation.restore import load_global  # torch only once the folder is known to be a run's

    tensors, info = load_global(run.journal, agreement, journal, blobs)
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
