"""What cannot be run is refused: a clear error, its exit code, no traceback, nothing half-written."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from nebula.cli.main import main
from nebula.security.pki import throwaway
from tests.e2e.processes import CLUSTERS
from tests.federated import clusters

CASES = {
    "no recipe file": (2, {"recipe": "missing.py"}, "missing.py"),
    "recipe that does not parse": (2, {"recipe_text": "def recipe(:\n"}, "bad.py"),
    "recipe without recipe()": (2, {"recipe_text": "x = 1\n"}, "recipe"),
    "recipe that raises": (2, {"recipe_text": "def recipe():\n    return 1 / 0\n"}, "ZeroDivisionError"),
    "unknown key": (2, {"set": "modle.layers=3"}, "model"),
    "wrong type": (2, {"set": "rounds=many"}, "rounds"),
    "values that do not fit": (2, {"set": "model.heads=5"}, "heads"),
    "missing data": (2, {"set": "data.path=/no/such/folder"}, "/no/such/folder"),
    "no cluster file": (2, {"clusters": "missing.yaml"}, "missing.yaml"),
    "cluster file with an unknown key": (2, {"clusters_text": CLUSTERS.replace("ranks: 1", "rank: 1")}, "ranks"),
    "cluster file with a wrong type": (2, {"clusters_text": CLUSTERS.replace("ranks: 1", "ranks: one")}, "ranks"),
    "cluster file that is no YAML": (2, {"clusters_text": "clusters: [}"}, "bad.yaml"),
    "a quorum larger than the federation": (2, {"set": "membership.quorum=3"}, "quorum"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_before_anything_is_written(case, job, tmp_path, monkeypatch, capsys, cache):
    code, change, told = CASES[case]
    recipe, cluster_file = job
    if "recipe_text" in change:
        recipe = tmp_path / "bad.py"
        recipe.write_text(change["recipe_text"])
    if "clusters_text" in change:
        cluster_file = tmp_path / "bad.yaml"
        cluster_file.write_text(change["clusters_text"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    arguments = ["run", change.get("recipe", recipe), "--clusters", change.get("clusters", cluster_file)]
    arguments += ["--out", tmp_path / "runs", *(["--set", change["set"]] if "set" in change else [])]
    assert refused([str(a) for a in arguments], capsys, told) == code
    assert not (tmp_path / "runs").exists() or list((tmp_path / "runs").iterdir()) == []


def refused(arguments: list[str], capsys, told: str) -> int:
    code = main(arguments)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert "error: " in err
    assert told in err
    return code


def test_a_port_in_use(job, tmp_path, monkeypatch, capsys, cache):
    recipe, _ = job
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        taken = tmp_path / "taken.yaml"
        taken.write_text(CLUSTERS.replace("port: 0", f"port: {port}"))
        arguments = ["run", str(recipe), "--clusters", str(taken), "--out", str(tmp_path / "runs")]
        assert refused(arguments, capsys, f"port {port}") == 3
    assert not (tmp_path / "runs").exists()


def test_no_room_on_the_disk(job, tmp_path, monkeypatch, capsys, cache):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1_000_000})())
    recipe, cluster_file = job
    arguments = ["run", str(recipe), "--clusters", str(cluster_file), "--out", str(tmp_path / "runs")]
    assert refused(arguments, capsys, "MB free") == 3
    assert not (tmp_path / "runs").exists()


def agent(folder: Path, cluster_file: Path, *more: str) -> list[str]:
    return [
        *("agent", "north", "--clusters", str(cluster_file), "--identity", str(folder / "pki" / "north")),
        *("--agreement", "sha256:0", "--out", str(folder / "out"), "--engine", "local", *more),
    ]


def test_an_agent_without_coordinator_identity_or_place(job, tmp_path, capsys):
    _, cluster_file = job
    throwaway(tmp_path / "pki", list(clusters(north=1).clusters), ["localhost"])
    nowhere = agent(tmp_path, cluster_file, "--coordinator", "127.0.0.1:9", "--max-stall", "0.5")
    assert refused(nowhere, capsys, "127.0.0.1:9") == 4
    (tmp_path / "pki" / "north" / "key.pem").unlink()
    assert refused(nowhere, capsys, "key") in (2, 5)
    assert refused([nowhere[0], "west", *nowhere[2:]], capsys, "west") == 2


@pytest.mark.parametrize("verb", ["resume", "report", "coordinator"])
def test_what_is_no_run(verb, tmp_path, capsys):
    assert refused([verb, str(tmp_path)], capsys, str(tmp_path)) == 2
