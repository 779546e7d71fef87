"""validate, doctor and report, called as a user calls them."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from runs import make_run

from nebula.cli.main import main

ROOT = Path(__file__).parents[2]
LAPTOP = str(ROOT / "clusters/laptop.yaml")


@pytest.fixture
def tiny(tmp_path):
    """A recipe on two small text files."""
    (tmp_path / "text").mkdir()
    for name in "ab":
        (tmp_path / "text" / f"{name}.txt").write_text("some words\n" * 50)
    recipe = tmp_path / "tiny.py"
    recipe.write_text(
        "from nebula.config import Data, Run\n\ndef recipe() -> Run:\n"
        f"    return Run(name='tiny', rounds=2, data=Data(path={str(tmp_path / 'text')!r}, seq_len=16))\n"
    )
    return str(recipe)


def test_validate_shows_what_a_round_costs(tiny, capsys):
    assert main(["validate", tiny, "--clusters", LAPTOP, "--set", "batch=4"]) == 0
    printed = capsys.readouterr()
    assert "tiny: 2 rounds of 20 inner steps" in printed.out
    assert "6.40 k (north 2.56 k, south 3.84 k)" in printed.out  # south states a batch of its own
    assert "1.10 kB of text" in printed.out
    assert printed.err == f"next: nebula run {tiny} --clusters {LAPTOP} --set batch=4\n"


def test_validate_as_json(tiny, capsys):
    assert main(["validate", tiny, "--clusters", LAPTOP, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    assert told["tokens_per_round"] == {"north": 20 * 16 * 16, "south": 20 * 12 * 16}
    assert told["up_bytes_per_round"] == round(told["params"] * 2 / 8)
    assert told["data_parallel_bytes_per_round"] == told["params"] * 2 * 2 * 20


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (["--set", "membership.quorum=3"], "quorum 3 exceeds the 2 clusters"),
        (["--set", "data.path=/no/such/folder"], "no such file or folder"),
        (["--set", "modle.dim=8"], "unknown key 'modle'"),
    ],
)
def test_validate_refuses(tiny, capsys, extra, told):
    assert main(["validate", tiny, "--clusters", LAPTOP, *extra]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert told in printed.err
    assert "hint: " in printed.err


@pytest.mark.parametrize(("recipe", "clusters"), [("nothing.py", LAPTOP), (LAPTOP, "nothing.yaml"), (LAPTOP, LAPTOP)])
def test_validate_refuses_wrong_files(recipe, clusters, capsys):
    assert main(["validate", recipe, "--clusters", clusters]) == 2
    assert "Traceback" not in capsys.readouterr().err


# --- doctor -------------------------------------------------------------------------------------------------------


@pytest.fixture
def federation(tmp_path, monkeypatch):
    """A cluster file with a given coordinator, and a cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def write(host, port):
        path = tmp_path / "c.yaml"
        path.write_text(f"coordinator: {{host: {host}, port: {port}}}\nclusters: {{north: {{}}}}\n")
        return str(path)

    return write


def checks_of(capsys):
    return {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}


def test_doctor_finds_this_machine_fit(federation, capsys):
    assert main(["doctor", "--clusters", federation("127.0.0.1", 0), "--json"]) == 0
    found = checks_of(capsys)
    machine = {"python", "torch", "device", "ray", "cores", "memory", "disk", "cache folder"}
    assert machine | {"TCP_INFO", "congestion control"} == found.keys()
    assert all(check["fix"] for check in found.values() if check["status"] != "ok")
    assert not any(check["status"] == "fail" for check in found.values())


def test_doctor_fails_where_a_port_is_taken(federation, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        file = federation("127.0.0.1", port)
        assert main(["doctor", "--clusters", file]) == 3
        printed = capsys.readouterr()
        assert f"127.0.0.1:{port}: Address already in use" in printed.out
        assert "→ end what listens there" in printed.out
        assert "error: 1 of " in printed.err
        assert main(["doctor", "--clusters", file, "--json"]) == 3
        assert checks_of(capsys)["coordinator"]["status"] == "fail"


def test_doctor_does_not_judge_the_ports_of_another_machine(federation, capsys):
    assert main(["doctor", "--clusters", federation("203.0.113.7", 7443), "--json"]) == 0
    assert checks_of(capsys)["coordinator"]["found"] == "203.0.113.7 is another machine"


def test_doctor_fails_where_the_cache_cannot_be_written(federation, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert main(["doctor"]) == 3
    assert "XDG_CACHE_HOME" in capsys.readouterr().err


# --- report -------------------------------------------------------------------------------------------------------


def test_report_writes_the_page_again(tmp_path, capsys):
    folder = make_run(tmp_path, 1)
    assert main(["report", str(folder)]) == 0
    assert Path(capsys.readouterr().out.strip()).read_text().startswith("<!doctype html>")


def test_report_refuses_another_folder(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "it has no run.json" in capsys.readouterr().err
