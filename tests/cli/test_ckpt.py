"""ckpt list and verify, on a folder as two clusters and a coordinator leave it: one cluster keeps its checkpoints in
the folder, the other at a URL."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from left import lead
from runs import make_agreement, make_run

from nebula.checkpoint import dcp
from nebula.cli.ckpt import load_model
from nebula.cli.main import main
from nebula.cli.rundir import RunDir
from nebula.config import Cluster, Federation
from nebula.federation.journal import open_journal

URL = "memory://bucket/south"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs"), 3)
    run = RunDir(folder)
    federation = Federation(clusters={"north": Cluster(ranks=2), "south": Cluster(checkpoints=URL)})
    (folder / "federation.json").write_text(federation.model_dump_json())
    with closing(open_journal(run.journal / "journal.sqlite", agreement=make_agreement().digest())) as journal:
        lead(journal, run.journal / "blobs", make_agreement())
    return folder


@pytest.fixture
def run_dir(model, tmp_path) -> Iterator[Path]:
    folder = Path(shutil.copytree(model, tmp_path / "toy"))
    for where in (folder / "checkpoints" / "north", URL):
        for tag in (2, 3):
            dcp.save(where, tag, {"w": torch.ones(100)}, {})
    yield folder
    MemoryFileSystem.store.clear()


def asked(capsys, *argv: object) -> tuple[int, dict]:
    code = main([*map(str, argv), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_list_shows_the_commit_and_the_checkpoints_of_every_cluster(run_dir, capsys):
    code, told = asked(capsys, "ckpt", "list", run_dir)
    assert (code, told["version"]) == (0, 3)
    assert [(c["cluster"], c["path"], c["round"]) for c in told["checkpoints"]] == [
        ("north", "checkpoints/north/2", 2),
        ("north", "checkpoints/north/3", 3),
        ("south", f"{URL}/2", 2),
        ("south", f"{URL}/3", 3),
    ]
    folder = run_dir / "checkpoints" / "north" / "3"
    assert told["checkpoints"][1]["bytes"] == sum(path.stat().st_size for path in folder.iterdir()) > 400
    (folder / "state.json").unlink()
    assert len(asked(capsys, "ckpt", "list", run_dir)[1]["checkpoints"]) == 3, "only whole ones count"
    assert main(["ckpt", "list", str(run_dir)]) == 0
    printed = capsys.readouterr()
    assert "version 3 of 6" in printed.out
    assert re.search(rf"{URL}/3 +before round 4, ", printed.out)
    assert "next: nebula ckpt verify" in printed.err


def test_verify_finds_all_as_it_was_written_and_leaves_it_so(run_dir, capsys):
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    code, told = asked(capsys, "ckpt", "verify", run_dir)
    assert (code, told["ok"], told["intact"]) == (0, True, True)
    whats = [finding["what"] for finding in told["findings"]]
    assert whats[0] == "journal"
    assert whats[-4:] == ["checkpoints/north/3", "checkpoints/north/2", f"{URL}/3", f"{URL}/2"]
    assert {finding["fault"] for finding in told["findings"]} == {""}
    assert main(["ckpt", "verify", str(run_dir)]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line[:4] for line in lines] == ["ok  "] * len(whats)
    assert "next: nebula ckpt export" in printed.err
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


def test_verify_says_what_is_wrong_and_with_what(run_dir, capsys):
    run = RunDir(run_dir)
    data = next((run.checkpoints / "north" / "3").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    MemoryFileSystem.store.pop("/bucket/south/2/state.json")
    blob = max((run.journal / "blobs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    blob.write_bytes(b"")
    code, told = asked(capsys, "ckpt", "verify", run_dir)
    assert (code, told["ok"], told["intact"]) == (1, False, False)
    wrong = {finding["what"]: finding["fault"] for finding in told["findings"] if finding["fault"]}
    assert len(wrong) == 3
    assert "bytes, not" in wrong["checkpoints/north/3"]
    assert "state.json is missing" in wrong[f"{URL}/2"]
    assert f"{blob.name} in {run.journal / 'blobs'} is corrupt" in str(wrong)
    assert main(["ckpt", "verify", str(run_dir)]) == 1
    printed = capsys.readouterr()
    assert len(re.findall("^WRONG", printed.out, re.MULTILINE)) == 3
    assert f"3 of {len(told['findings'])} are not as they were written" in printed.err
    assert "hint: `nebula resume`" in printed.err


def test_verify_goes_on_where_a_store_cannot_be_looked_into(run_dir, capsys):
    federation = Federation(clusters={"north": Cluster(checkpoints="carrier-pigeon://loft"), "south": Cluster()})
    (run_dir / "federation.json").write_text(federation.model_dump_json())
    code, told = asked(capsys, "ckpt", "verify", run_dir)
    assert code == 1
    (wrong,) = [finding for finding in told["findings"] if finding["fault"]]
    assert wrong["what"] == "carrier-pigeon://loft"
    assert "not known" in wrong["fault"]


def test_a_run_that_is_under_way_is_not_verified(run_dir, capsys):
    path = RunDir(run_dir).journal / "journal.sqlite"
    with closing(open_journal(path, agreement=make_agreement().digest())):
        for verb in ("verify", "export"):
            code, told = asked(capsys, "ckpt", verb, run_dir)
            assert code == 3
            assert "the coordinator of this run still runs" in told["error"]["message"]
            assert "stop it" in told["error"]["hint"]


def test_export_takes_journal_and_blobs_from_elsewhere(run_dir, tmp_path, capsys):
    run = RunDir(run_dir)
    assert main(["ckpt", "export", str(run_dir)]) == 0
    expected = load_model(run_dir / "model.safetensors").tensors
    run.journal.rename(tmp_path / "elsewhere")
    assert main(["ckpt", "export", str(run_dir)]) == 2
    assert "--journal" in capsys.readouterr().err
    journal, blobs = tmp_path / "elsewhere" / "journal.sqlite", f"file://{tmp_path}/elsewhere/blobs"
    assert main(["ckpt", "export", str(run_dir), "--journal", str(journal), "--blobs", blobs]) == 0
    again = load_model(run_dir / "model.safetensors").tensors
    assert all(torch.equal(again[name], expected[name]) for name in {**again, **expected})
