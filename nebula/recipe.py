"""From files to config: a recipe is a program and is executed, a cluster file states facts and is only parsed.

Both end as validated models or as a UsageError that says what is wrong, where, why and what to do.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nebula import config
from nebula.config import Federation, Run
from nebula.errors import UsageError
from nebula.strict import ConfigT, did_you_mean, parse_yaml, shown, translate, validate

MAX_BYTES = 1 << 20


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Run:
    """Execute a recipe and apply `a.b=value` overrides. Raises UsageError, whatever the recipe raises."""
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    source = _read(path, "recipe")
    try:
        exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
        make = module.__dict__.get("recipe")
        run = make() if callable(make) else None
    except (Exception, SystemExit) as error:
        raise _recipe_error(path, error) from error
    if not callable(make):
        raise UsageError(f"not a recipe ({path}): it defines no function recipe()", hint="add `def recipe() -> Run:`")
    if not isinstance(run, Run):
        raise UsageError(
            f"recipe() returned {type(run).__name__} ({path}): it must return a Run",
            hint="end it with `return Run(name=..., ...)`",
        )
    return _override(run, overrides)


def load_federation(path: Path, overrides: Sequence[str] = ()) -> Federation:
    """Parse a cluster file and apply `a.b=value` overrides. Raises UsageError."""
    data = parse_yaml(_read(path, "cluster file"), str(path))
    if not isinstance(data, dict):
        raise UsageError(
            f"not a cluster file ({path}): expected keys, got {shown(data)}",
            hint="it has the keys `coordinator` and `clusters`; see clusters/laptop.yaml",
        )
    return _override(validate(Federation, data, lambda key: _join(str(path), key)), overrides)


def _read(path: Path, what: str) -> str:
    if not path.is_file():
        siblings = [str(p) for p in path.parent.glob("*" + path.suffix)] if path.parent.is_dir() else []
        raise UsageError(f"no such {what}: {path}", hint=did_you_mean(str(path), siblings) or "check the path")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise UsageError(
            f"{what} too large ({path}): {size} bytes of at most {MAX_BYTES}", hint="is it the right file?"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the {what} ({path}): {error}", hint="it must be readable UTF-8 text") from error


def _recipe_error(path: Path, error: BaseException) -> UsageError:
    """The innermost line of the recipe itself, and the cause in one sentence."""
    line = error.lineno if isinstance(error, SyntaxError) and error.filename == str(path) else None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    place = f"{path}:{line}" if line else str(path)
    if isinstance(error, UsageError):
        return UsageError(f"{error.message} ({place})", hint=error.hint)
    if isinstance(error, ValidationError):
        title = error.title
        return translate(error, getattr(config, title, None), lambda key: _join(place, title, key))
    cause = error.msg if isinstance(error, SyntaxError) else str(error)
    return UsageError(f"the recipe failed ({place}): {type(error).__name__}: {cause}", hint="correct that line")


def _join(place: str, *keys: str) -> str:
    key = ".".join(k for k in keys if k)
    return f"{place}: {key}" if key else place


# --- overrides ----------------------------------------------------------------------------------------------------


def _override(model: ConfigT, overrides: Sequence[str]) -> ConfigT:
    """The model with each `a.b=value` applied. A new `kind` resets its siblings to that kind's defaults; kinds are
    therefore applied first, in whatever order they were given."""
    if not overrides:
        return model
    settings = [_split(text) for text in overrides]
    data = model.model_dump(mode="json")
    for key, value in sorted(settings, key=lambda setting: setting[0].split(".")[-1] != "kind"):
        _set(data, model, key.split("."), value, key)

    def where(path: str) -> str:
        return f"--set: {path or ', '.join(key for key, _ in settings)}"

    return validate(type(model), data, where)


def _split(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UsageError(f"--set {text!r} is not of the form key=value", hint="for example --set optimizer.lr=0.001")
    return key, parse_yaml(value, f"--set: {key}")


def _set(data: Any, model: object, parts: Sequence[str], value: Any, key: str) -> None:
    """Set one value in a model's dump. Whether a model has such a field is left to validation; here fail only the
    keys that it would let through (a new entry of a dict) or that have no place (below a plain value)."""
    part, *rest = parts
    index: Any = part
    if isinstance(data, list):
        known = [str(i) for i in range(len(data))]
        index = known.index(part) if part in known else None
    elif isinstance(data, dict):
        known = list(data)
        index = part if part in data or not isinstance(model, dict) else None
    else:
        known, index = [], None
    if index is None:
        why = f"the keys here are {', '.join(known)}" if known else f"{shown(data)} has no keys"
        hint = did_you_mean(part, known) or "correct its spelling"
        raise UsageError(f"unknown key {part!r} (--set: {key}): {why}", hint=hint)
    if rest:
        if isinstance(data, dict) and data.get(part) is None:
            data[part] = {}
        below = model.get(part) if isinstance(model, dict) else getattr(model, part, None)
        return _set(data[index], below, rest, value, key)
    if part == "kind" and data.get(part) != value:
        data.clear()
    data[index] = value
