"""`nebula run`: a whole federation on this machine, from a recipe to a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nebula.cli import output
from nebula.cli.display import Display, closing
from nebula.cli.launch import EngineKind, Launch
from nebula.cli.prepare import prepare, resolve
from nebula.cli.rundir import RunDir

SAMPLE_TOKENS = 120


def command(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a Python file.")],
    clusters: Annotated[Path, typer.Option(help="The cluster file.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Change the recipe: key.path=value.")] = None,
    out: Annotated[Path, typer.Option(help="Where the run's folder is made.")] = Path("runs"),
    engine: Annotated[EngineKind, typer.Option(help="Ranks as Ray actors, or as local processes.")] = "ray",
    json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Train a recipe on the clusters of a file, all on this machine. Ctrl-C stops after the current round."""
    resolved, federation = resolve(recipe, clusters, overrides or [])
    output.say("preparing data …")
    run = prepare(resolved, federation, out)
    output.say(f"run {run.path}")
    conclude(run, engine, "run", as_json=json)


def conclude(run: RunDir, engine: EngineKind, verb: str, *, as_json: bool) -> None:
    """Drive a run to its end, whatever that is, and leave a report behind."""
    agreement = run.agreement()
    display = Display(Console(stderr=True), agreement.run.rounds)
    launch = Launch(run, display, engine)
    try:
        try:
            summary = launch.drive()
        finally:
            display.close()
            _report(run)
    except KeyboardInterrupt:
        output.say(f"stopped; go on with: nebula resume {run.path}")
        raise
    text = closing(display.view, summary, run_dir=run.path, sample=sample(run))
    output.result(verb, {"summary": summary, "run_dir": str(run.path)}, text=text, as_json=as_json)


def _report(run: RunDir) -> None:
    """Of whatever there is. That it cannot be written must not hide how the run ended."""
    from nebula.metrics.report import render

    if run.summary.exists():
        try:
            render(run.path)
        except OSError as error:
            output.say(f"no report: {error}")


def sample(run: RunDir) -> str:
    """What the trained model makes of the recipe's prompt."""
    from nebula.cli.ckpt import load_model
    from nebula.cli.sample import continuation

    model = load_model(run.path)
    prompt = model.agreement.run.prompt
    return prompt + continuation(model, prompt, tokens=SAMPLE_TOKENS, temperature=0.7, seed=0)
