"""`nebula validate`: does a recipe fit a cluster file, and what would it send?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nebula.cli import output
from nebula.cli.prepare import resolve, run_command
from nebula.config import Agreement, agree
from nebula.errors import UsageError
from nebula.metrics import units
from nebula.metrics.flops import active_parameters, bits_per_parameter, data_parallel_bytes


def command(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as trainers/code_moe.py.")],
    clusters: Annotated[Path, typer.Option(help="A cluster file, such as clusters/laptop.yaml.")],
    set: Annotated[list[str] | None, typer.Option(help="Change a value: --set rounds=4. May be repeated.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a recipe against a cluster file and show what a round costs. Starts nothing."""
    from nebula.data.corpus import find
    from nebula.models.init import count

    run, federation = resolve(recipe, clusters, set or [])
    try:
        agreement = agree(run, federation, tokenizer="", unigram_entropy=0.0)
    except ValueError as error:
        raise UsageError(f"they do not fit together ({recipe}, {clusters}): {error}", hint="change one") from error
    text_bytes = sum(document.bytes for document in find(run.data))
    fields = estimate(agreement, count(run.model)) | {"data_bytes": text_bytes}
    output.result(
        "validate",
        fields,
        text=output.aligned(table(agreement, fields)),
        next=run_command(recipe, clusters, set or []),
        as_json=json,
    )


def estimate(agreement: Agreement, params: int) -> dict[str, object]:
    """What follows from the config alone. Bytes are of one cluster and round, before entropy coding and framing."""
    run = agreement.run
    up, down = (params * bits_per_parameter(codec, run.model) / 8 for codec in (run.wan.up, run.wan.down))
    return {
        "params": params,
        "active_params": active_parameters(run.model),
        "rounds": run.rounds,
        "fragments": run.fragments,
        "tokens_per_round": {name: agreement.tokens_per_round(name) for name in agreement.members},
        "up_bytes_per_round": round(up),
        "down_bytes_per_round": round(down),
        "data_parallel_bytes_per_round": data_parallel_bytes(params, run.inner_steps, 1),
    }


def table(agreement: Agreement, fields: dict[str, object]) -> list[tuple[str, str]]:
    run = agreement.run
    figures = {key: value for key, value in fields.items() if isinstance(value, int)}
    tokens = {name: agreement.tokens_per_round(name) for name in agreement.members}
    each = ", ".join(f"{name} {units.amount(count)}" for name, count in tokens.items())
    up, down = figures["up_bytes_per_round"], figures["down_bytes_per_round"]
    instead = figures["data_parallel_bytes_per_round"]
    return [
        ("run", f"{run.name}: {run.rounds} rounds of {run.inner_steps} inner steps"),
        ("parameters", f"{units.amount(figures['params'])}, {units.amount(figures['active_params'])} used per token"),
        ("fragments", f"{run.fragments}"),
        ("data", f"{units.size(figures['data_bytes'])} of text"),
        ("tokens per round", f"{units.amount(sum(tokens.values()))} ({each})"),
        ("bytes per round", f"{units.size(up)} up, {units.size(down)} down per cluster, at most, plus framing"),
        ("", f"({units.times(instead / (up + down))} less than per-step data parallelism in bf16)"),
    ]
