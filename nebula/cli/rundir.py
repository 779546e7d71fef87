"""A run's folder: the fixed names in it, made whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from nebula import files
from nebula.config import Agreement, Federation
from nebula.errors import UsageError
from nebula.types import Json

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RunDir:
    path: Path

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def journal(self) -> Path:
        return self.path / "journal"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def identity(self, name: str) -> Path:
        return self.path / "pki" / name

    def cluster(self, name: str) -> Path:
        return self.path / "clusters" / name

    def agreement(self) -> Agreement:
        return self._parse("run.json", lambda text: Agreement.parse(json.dumps(_object(text)["agreement"]).encode()))

    def federation(self) -> Federation:
        return self._parse("federation.json", Federation.model_validate_json)

    def tokenizer(self) -> str:
        return self._read("tokenizer.json")

    def _parse(self, name: str, parse: Callable[[str], T]) -> T:
        text = self._read(name)
        try:
            return parse(text)
        except (ValidationError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{self.path / name} is not what a run leaves behind: {error}", hint="give the folder of a run"
            ) from error

    def _read(self, name: str) -> str:
        try:
            return (self.path / name).read_text("utf-8")
        except OSError as error:
            raise UsageError(
                f"{self.path} is not a run's folder: {name}: {error.strerror}", hint="`nebula run` makes one per run"
            ) from error


def _object(text: str) -> dict[str, Json]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value


def create(
    out: Path, agreement: Agreement, federation: Federation, tokenizer: str, fill: Callable[[Path], None]
) -> RunDir:
    """Make `out/<run>` or, if there is one, `out/<run>-2`, … It appears with everything in it; `fill` adds the rest."""
    out.mkdir(parents=True, exist_ok=True)
    aside = out / f".{agreement.run.name}.{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        run_json: Mapping[str, Json] = {
            "schema": 1,
            "digest": agreement.digest(),
            "agreement": json.loads(agreement.canonical()),
        }
        files.write(aside / "run.json", json.dumps(run_json, indent=1).encode())
        files.write(aside / "federation.json", federation.model_dump_json(indent=1).encode())
        files.write(aside / "tokenizer.json", tokenizer.encode())
        fill(aside)
        return RunDir(_claim(aside, out / agreement.run.name))
    except BaseException:  # a Ctrl-C, too, leaves nothing behind
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _claim(aside: Path, wanted: Path) -> Path:
    number = 1
    while True:
        target = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            aside.rename(target)
            return target
        except OSError:
            if not target.exists():
                raise
        number += 1
