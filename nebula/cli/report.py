"""`nebula report`: write a run's report.html again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nebula.cli import output


def command(
    run_dir: Annotated[Path, typer.Argument(help="A run's folder, such as runs/code-moe.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Render report.html from run.json, events.jsonl and summary.json, of a finished run or not."""
    from nebula.metrics.report import render

    path = render(run_dir)
    fields = {"report": str(path)}
    output.result("report", fields, text=str(path), next=f"nebula sample {run_dir}", as_json=json)
