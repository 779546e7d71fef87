"""Real runs in real processes, and what happens when these are killed. Both engines and all interruptions must end with
the very digest of an uninterrupted run."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
from pathlib import Path

import pytest

from nebula.cli.main import main
from nebula.metrics.events import read
from tests.e2e.processes import NebulaProcess, below, command_line, summary

RAY_RANK = "ray::RankHost"


def run(start, job, *more: str) -> NebulaProcess:
    recipe, clusters = job
    return start("run", recipe, "--clusters", clusters, *more)


def finished(nebula: NebulaProcess, tmp_path) -> dict:
    code, _ = nebula.finish()
    assert code == 0, nebula.said
    return summary(tmp_path / "runs" / "tiny")


def test_a_run_leaves_behind_what_it_should(reference):
    run_dir = reference["run_dir"]
    assert {"run.json", "events.jsonl", "summary.json", "report.html", "checkpoints"} <= {
        p.name for p in run_dir.iterdir()
    }
    assert (reference["state"], reference["rounds"], reference["tokens"]) == ("completed", 6, 6 * 3 * 6 * 32)
    evaluated = [e["loss"] for e in read(run_dir / "events.jsonl") if e["event"] == "eval"]
    assert len(evaluated) == 3
    assert evaluated[-1] < evaluated[0] - 0.05
    assert reference["eval_loss"] == evaluated[-1]
    for cluster in ("north", "south"):
        wan = reference["clusters"][cluster]["wan"]
        assert 2 < wan["up_bits_per_param_per_round"] < 6  # two, and what surrounds packets this small
        assert 0 < wan["goodput_share"] < 1


def test_what_is_said_is_plain_and_ends_with_the_next_command(reference):
    said, out = "\n".join(reference["said"]), reference["out"]
    assert "\x1b" not in said + out
    assert "\r" not in said + out
    assert "round 6/6" in said
    for words in (
        "Held-out loss",
        "unigram entropy",
        "bf16 data parallelism",
        "Sample",
        "report.html",
        "nebula sample",
    ):
        assert words in out


def test_no_secret_is_in_a_log(reference):
    run_dir = reference["run_dir"]
    key = (run_dir / "pki" / "north" / "key.pem").read_text().splitlines()[1]
    logs = [p for p in run_dir.rglob("*") if p.suffix in (".log", ".jsonl", ".json", ".html")]
    assert logs
    assert [p.name for p in logs if key in p.read_text()] == []


def test_a_completed_run_is_not_run_again(reference, capsys):
    before = summary(reference["run_dir"])
    assert main(["resume", str(reference["run_dir"])]) == 0
    assert "completed" in capsys.readouterr().out
    assert summary(reference["run_dir"]) == before


def test_what_the_readme_does_with_a_finished_run_works(reference, capsys):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    commands = [line for line in readme.splitlines() if line.startswith("nebula ") and "runs/code-moe" in line]
    assert len(commands) >= 3
    for command in commands:
        arguments = shlex.split(command.replace("runs/code-moe", str(reference["run_dir"])))[1:]
        assert main(arguments) == 0, (command, capsys.readouterr())


def test_a_run_that_is_interrupted_and_then_killed_ends_as_if_it_had_not_been(start, job, tmp_path, reference):
    nebula, run_dir = run(start, job, "--engine", "local"), tmp_path / "runs" / "tiny"
    nebula.wait_for("round 2/6")
    nebula.interrupt()
    code, _ = nebula.finish()
    assert code == 130
    assert any("nebula resume" in line for line in nebula.said)
    assert summary(run_dir)["state"] == "stopped"
    assert (run_dir / "report.html").exists()
    nebula = start("resume", run_dir, "--engine", "local")
    nebula.wait_for("round 4/6")
    children = nebula.descendants("nebula")
    assert len(children) >= 3
    nebula.process.kill()
    nebula.process.communicate()  # returns when the last holder of its pipes is gone
    told = finished(start("resume", run_dir, "--engine", "local"), tmp_path)
    assert (told["state"], told["rounds"]) == ("completed", 6)
    assert told["global_digest"] == reference["global_digest"]


@pytest.mark.ray
def test_on_ray_rank_coordinator_and_cluster_may_all_be_killed(start, job, tmp_path, reference):
    nebula = run(start, job)
    nebula.wait_for("round 1/6")
    nebula.kill(RAY_RANK)
    nebula.wait_for("round 2/6")
    nebula.kill("main coordinator")
    nebula.wait_for("round 3/6")
    for pid in whole_cluster(nebula, "south"):
        kill(pid)
    told = finished(nebula, tmp_path)
    assert told["global_digest"] == reference["global_digest"]
    assert told["clusters"]["south"]["rejoins"] >= 1


def whole_cluster(nebula: NebulaProcess, cluster: str) -> list[int]:
    """The agent of a cluster, its Ray head, and everything the two have started."""
    (agent,) = nebula.descendants(f"main agent {cluster} ")
    port = re.search(r"--ray 127.0.0.1:([0-9]+)", command_line(agent))[1]
    head = nebula.descendants(f"start --head .*--port={port} ")[0]
    return [head, agent, *below(head), *below(agent)]


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended with another one
        os.kill(pid, signal.SIGKILL)
