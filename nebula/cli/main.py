"""`nebula`: the verbs, and the one place where errors become messages and exit codes.

A verb's module is imported when the verb is called, so that `--help` needs none of them, let alone torch.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from nebula import __version__
from nebula.cli import output
from nebula.errors import NebulaError, PreflightError, UsageError

VERBS = {
    "run": "Train a recipe on the clusters of a file, all on this machine.",
    "resume": "Go on with a run that was stopped or failed.",
    "validate": "Check a recipe against a cluster file; starts nothing.",
    "plan": "Predict what a round will cost; starts nothing.",
    "doctor": "Check whether this machine can run Nebula.",
    "coordinator": "Own a run's global state until it ends.",
    "agent": "Take part in a run as one cluster.",
    "report": "Write a run's report.html again.",
    "sample": "Let a trained model write text.",
    "sim": "Put the protocol on trial in simulated worlds where everything fails.",
    "bench": "Measure what Nebula's parts can do on this machine.",
    "ckpt": "List and verify a run's checkpoints; export its model as one file.",
}
"""Each is a module beside this one whose `command` is a function with typer parameters, or a group of them."""

EPILOG = (
    "Exit codes: 0 ok · 1 the run failed · 2 usage or config · 3 preflight · 4 a peer does not answer · "
    "5 identity refused · 6 quorum lost · 130 interrupted"
)

CommandLineError: type[Exception] = typer.BadParameter.__bases__[0]
"""Typer's UsageError, the base of all it finds wrong on a command line; newer releases do not share click's."""


class LazyCommand(TyperCommand):
    """Stands for a verb in the list of commands; when called, the real one takes its place."""

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        return load(str(self.name)).make_context(info_name, args, parent=parent, **extra)


class Verbs(TyperGroup):
    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, text in VERBS.items():
            self.add_command(LazyCommand(name, help=text))


def load(verb: str) -> Any:
    """Import a verb's module and make its command."""
    target = importlib.import_module(f"nebula.cli.{verb}").command
    if isinstance(target, typer.Typer):
        return typer.main.get_command(target)
    single = typer.Typer(add_completion=False)
    single.command(name=verb)(target)
    return typer.main.get_command(single)


app = typer.Typer(cls=Verbs, epilog=EPILOG, pretty_exceptions_enable=False, invoke_without_command=True)


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Train one model on several clusters joined only by slow, untrusted links.

    Start with: nebula run trainers/code_moe.py --clusters clusters/laptop.yaml
    """
    if version:
        print(f"nebula {__version__}")
    elif context.invoked_subcommand is None:
        context.fail("Missing command.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in given
    arguments = [argument for argument in given if argument != "--debug"]
    verb = next((a for a in arguments if a in VERBS), "")
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="nebula", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        output.say("interrupted")
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        told = explained(error, verb)
        with contextlib.suppress(OSError):  # with nowhere left to say it, the exit code still does
            output.failure(verb, told, as_json="--json" in arguments)
        return told.exit_code


def explained(error: Exception, verb: str) -> NebulaError:
    """Any exception as an error for users: ours, typer's complaint about the command line, or a bug."""
    if isinstance(error, NebulaError):
        return error
    if isinstance(error, CommandLineError):
        message = " ".join(error.format_message().split())  # type: ignore[attr-defined]
        return UsageError(message, hint=f"see nebula {verb} --help".replace("  ", " "))
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return PreflightError(f"the disk is full: {error}", hint="free some space, then go on")
    cause = " ".join(f"{type(error).__name__}: {error}".split())
    return NebulaError(f"unexpected: {cause}", hint="run again with --debug to see where")


if __name__ == "__main__":
    sys.exit(main())
