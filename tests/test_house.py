"""Rules of the house that no other tool checks."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import nebula
from nebula.cli.main import VERBS

ROOT = Path(__file__).parent.parent
SOURCES = [p for p in (ROOT / "nebula").rglob("*.py") if "proto" not in p.parts]


def test_generated_code_is_fresh(tmp_path):
    protos = sorted((ROOT / "protos").rglob("*.proto"))
    generate = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'protos'}"]
    outputs = [f"--python_out={tmp_path}", f"--grpc_python_out={tmp_path}"]
    subprocess.run([*generate, *outputs, *map(str, protos)], check=True)
    made = {p.relative_to(tmp_path): p.read_text() for p in tmp_path.rglob("*.py")}
    kept = {p.relative_to(ROOT): p.read_text() for p in (ROOT / "nebula/proto/v1").glob("*_pb2*.py")}
    assert made == kept, "run `make proto` and commit what it writes"


def test_files_and_functions_stay_small():
    long_files = {p.name: n for p in SOURCES if (n := len(p.read_text().splitlines())) > 400}
    functions = {
        f"{path.name}:{node.name}": node.end_lineno - node.lineno
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert long_files == {}
    assert {name: n for name, n in functions.items() if n > 80} == {}


def test_light_modules_import_neither_torch_nor_ray():
    modules = "config recipe cli.main security.pki security.session metrics.events federation.agent runtime.gateway"
    code = "; ".join(f"import nebula.{m}" for m in modules.split())
    check = f"import sys; {code}; print([m for m in ('torch', 'ray') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_version_is_stated_once():
    assert f'version = "{nebula.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_the_readmes_make_targets_and_verbs_exist():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^make (\w+)", readme, re.MULTILINE))
    assert {"train", "test"} <= targets
    assert {t for t in targets if f"\n{t}:" not in makefile} == set()
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    verbs = set(re.findall(r"\bnebula ([a-z]+)\b(?! /| trains)", readme))
    assert {"run", "resume", "sample", "report", "ckpt", "doctor", "validate", "plan"} <= verbs
    assert verbs <= set(VERBS)
