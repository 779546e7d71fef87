"""`nebula resume`: goes on with a run that was stopped or failed, from its last commit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nebula.cli import output
from nebula.cli.launch import EngineKind, summary_of
from nebula.cli.run import conclude
from nebula.cli.rundir import RunDir


def command(
    run_dir: Annotated[Path, typer.Argument(help="The run's folder.")],
    engine: Annotated[EngineKind, typer.Option(help="Ranks as Ray actors, or as local processes.")] = "ray",
    json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Go on with a run exactly where its last commit left it."""
    run = RunDir(run_dir)
    run.agreement()  # a clear error for what is no run's folder
    if run.summary.exists() and summary_of(run)["state"] == "completed":
        summary = summary_of(run)
        text = f"run {run_dir} is completed: nothing is left to do"
        output.result("resume", {"summary": summary}, text=text, next=f"nebula sample {run_dir}", as_json=json)
        return
    conclude(run, engine, "resume", as_json=json)
