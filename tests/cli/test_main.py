from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nebula.cli import main as cli
from nebula.cli import output
from nebula.errors import AuthError, NebulaError, PreflightError, QuorumError, UnreachableError, UsageError


@pytest.fixture
def verb(monkeypatch):
    """Let `nebula report RUN_DIR` do something else."""

    def replace(act):
        monkeypatch.setattr("nebula.metrics.report.render", lambda run_dir: act())

    return replace


def raiser(error):
    def act():
        raise error

    return act


def test_help_is_quick_and_needs_no_heavy_module():
    heavy = "{'torch', 'ray', 'grpc', 'numpy', 'matplotlib', 'jinja2'}"
    code = (
        "import sys; from nebula.cli.main import main; main(['--help']); "
        "import nebula.recipe, nebula.metrics.report, nebula.metrics.history, nebula.cli.output; "
        f"print('heavy', {heavy} & sys.modules.keys(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "heavy set()" in done.stderr
    assert "\x1b" not in done.stdout
    for told in (*cli.VERBS, "Exit codes", "130 interrupted", "--debug"):
        assert told in done.stdout, told


@pytest.mark.parametrize("verb", [v for v in cli.VERBS if (Path(cli.__file__).parent / f"{v}.py").exists()])
def test_every_verb_explains_itself(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    assert verb in capsys.readouterr().out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == "nebula 0.1.0\n"


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], "Missing command"),
        (["reprot"], "Did you mean 'report'?"),
        (["report"], "Missing argument"),
        (["report", ".", "--no-such"], "--no-such"),
        (["sample", ".", "--tokens", "0"], "--tokens"),
        (["sample", ".", "--temperature", "0"], "--temperature"),
        (["sample", ".", "--seed", "x"], "--seed"),
        (["--no-such", "report", "."], "--no-such"),
        (["ckpt", "exprt"], "exprt"),
    ],
)
def test_a_wrong_command_line_ends_with_2(argv, told, capsys):
    assert cli.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert told in printed.err
    assert "hint: see nebula" in printed.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NebulaError("no"), 1),
        (UsageError("no"), 2),
        (PreflightError("no"), 3),
        (UnreachableError("no"), 4),
        (AuthError("no"), 5),
        (QuorumError("no"), 6),
        (RuntimeError("no"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_every_error_has_its_exit_code_and_no_traceback(verb, error, code, capsys):
    verb(raiser(error))
    assert cli.main(["report", "."]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    assert "\x1b" not in printed.err


def test_message_and_hint_are_told(verb, capsys):
    verb(raiser(UsageError("this is wrong", hint="do that")))
    cli.main(["report", "."])
    assert capsys.readouterr().err == "error: this is wrong\nhint: do that\n"


def test_a_bug_is_one_line_that_names_debug(verb, capsys):
    verb(raiser(RuntimeError("first\nsecond")))
    cli.main(["report", "."])
    assert capsys.readouterr().err.splitlines() == [
        "error: unexpected: RuntimeError: first second",
        "hint: run again with --debug to see where",
    ]


@pytest.mark.parametrize("argv", [["--debug", "report", "."], ["report", ".", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(verb, argv, capsys):
    verb(raiser(RuntimeError("no")))
    assert cli.main(argv) == 1
    assert "Traceback" in capsys.readouterr().err


def test_json_results_and_errors_share_an_envelope(verb, capsys):
    verb(lambda: Path("report.html"))
    assert cli.main(["report", ".", "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert json.loads(printed.out) == {
        "schema": 1,
        "command": "report",
        "ok": True,
        "report": "report.html",
        "next": "nebula sample .",
    }
    verb(raiser(QuorumError("too few", hint="wait")))
    assert cli.main(["report", ".", "--json"]) == 6
    printed = capsys.readouterr()
    assert printed.err == ""
    told = {"kind": "QuorumError", "message": "too few", "hint": "wait", "exit_code": 6}
    assert json.loads(printed.out) == {"schema": 1, "command": "report", "ok": False, "error": told}


def test_the_result_goes_to_stdout_and_the_next_command_to_stderr(verb, capsys):
    verb(lambda: Path("report.html"))
    cli.main(["report", "runs/x"])
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("report.html\n", "next: nebula sample runs/x\n")


def test_the_envelope_is_strict_json():
    assert json.loads(output.envelope("x", ok=True, loss=float("nan"))) == {
        "schema": 1,
        "command": "x",
        "ok": True,
        "loss": None,
    }


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_colour_is_for_terminals_that_want_it(monkeypatch, capsys, no_color, coloured):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    output.failure("x", UsageError("no"), as_json=False)
    assert ("\x1b[1;31m" in capsys.readouterr().err) is coloured
