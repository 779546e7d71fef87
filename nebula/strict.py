"""Strict parsing of what users write: YAML without surprises, and pydantic's errors in our words.

Every refusal is a UsageError: what is wrong, where (file: path.to.key), why, and what to do.
"""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from nebula.errors import UsageError

MAX_DEPTH = 32
MAX_PROBLEMS = 5

ConfigT = TypeVar("ConfigT", bound=BaseModel)
Where = Callable[[str], str]
"""Names the place of a key to the user: path.to.key → "file: path.to.key"."""


# --- YAML ---------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core types only, so that `no`, `on`, `12:30` and dates stay text and 3e-3 is a number. No tags, no
    aliases (they multiply), no duplicate keys, bounded depth."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        problem = ""
        if isinstance(event, yaml.AliasEvent):
            problem = "aliases (*name) are not allowed"
        elif getattr(event, "tag", None) is not None:
            problem = f"tags such as {event.tag} are not allowed"
        elif self._depth >= MAX_DEPTH:
            problem = f"nested more than {MAX_DEPTH} deep"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
            key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"(?:~|null|)$", ["~", "n", ""]),
    ("bool", r"(?:true|false)$", list("tf")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)$", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def parse_yaml(text: str, where: str) -> Any:
    """Plain JSON-like data. Raises UsageError with `where` and the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        why = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UsageError(f"not valid YAML ({where}{line}): {why}", hint="correct that line") from error


# --- validation ---------------------------------------------------------------------------------------------------


def validate(kind: type[ConfigT], data: Any, where: Where) -> ConfigT:
    """Through JSON, because the models are strict and JSON has no tuples. Raises UsageError."""
    try:
        return kind.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise translate(error, kind, where) from error


@dataclass(frozen=True, slots=True)
class _Problem:
    key: str
    what: str
    why: str
    hint: str


def translate(error: ValidationError, root: type[BaseModel] | None, where: Where) -> UsageError:
    """One UsageError for everything that pydantic found. `root` is the model that was validated, if it is known."""
    problems: dict[str, _Problem] = {}
    for details in error.errors(include_url=False):
        if details["type"] == "default_factory_not_called":  # a default that follows from what is wrong elsewhere
            continue
        problem = _problem(details, root)
        problems.setdefault(problem.key, problem)
    found = list(problems.values())
    if len(found) == 1:
        return UsageError(f"{found[0].what} ({where(found[0].key)}): {found[0].why}", hint=found[0].hint)
    lines = [f"  {p.what} ({where(p.key)}): {p.why}; {p.hint}" for p in found[:MAX_PROBLEMS]]
    if len(found) > MAX_PROBLEMS:
        lines.append(f"  and {len(found) - MAX_PROBLEMS} more")
    return UsageError("\n".join([f"{len(found)} things are wrong:", *lines]), hint="correct these first")


def _problem(details: ErrorDetails, root: type[BaseModel] | None) -> _Problem:
    path, siblings = _walk(root, details["loc"])
    key, last = ".".join(path), path[-1] if path else ""
    context = details.get("ctx", {})
    match details["type"]:
        case "extra_forbidden":
            hint = did_you_mean(last, siblings) or "remove it, or correct its spelling"
            return _Problem(key, f"unknown key {last!r}", f"the keys here are {', '.join(siblings)}", hint)
        case "missing":
            return _Problem(key, f"missing key {last!r}", "it has no default", f"add `{last}`")
        case "value_error":
            what = f"{last} does not fit together" if last else "the values do not fit together"
            return _Problem(key, what, str(context["error"]), "change one of them")
        case "union_tag_not_found":
            return _Problem(key, f"missing key 'kind' in {last!r}", "it says which one is meant", "add `kind`")
        case "union_tag_invalid":
            known = re.findall(r"'([^']*)'", context["expected_tags"])
            what, tag = f"unknown kind {context['tag']!r}", str(context["tag"])
            return _Problem(
                f"{key}.kind", what, f"the kinds are {', '.join(known)}", did_you_mean(tag, known) or known[0]
            )
        case "string_pattern_mismatch":
            why = "expected lower-case letters, digits and '-', at most 40, a letter first"
        case "int_type" | "int_from_float":
            why = "expected a whole number"
        case "float_type":
            why = "expected a number"
        case "string_type":
            why = "expected text"
        case "too_short":
            why = f"expected at least {context['min_length']}"
        case _:
            why = details["msg"].replace("Input should be", "expected")
    return _Problem(key, f"wrong value {shown(details['input'])}", why, f"correct {last}" if last else "correct it")


def _walk(root: type[BaseModel] | None, loc: Iterable[int | str]) -> tuple[list[str], list[str]]:
    """The path as the user wrote it (pydantic adds labels of union members), and the keys known beside its end."""
    path: list[str] = []
    siblings: list[str] = []
    annotation: Any = root
    for part in loc:
        label, annotation = _resolve(annotation, part)
        if label or part == "[key]":
            continue
        path.append(str(part))
        siblings = []
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            siblings = list(annotation.model_fields)
            field = annotation.model_fields.get(str(part))
            annotation = field.annotation if field else None
        else:
            arguments = [a for a in typing.get_args(annotation) if a is not Ellipsis]
            annotation = arguments[-1] if arguments else None
    return path, siblings


def _resolve(annotation: Any, part: int | str) -> tuple[bool, Any]:
    """Strip Annotated and `| None`. True if `part` is pydantic's label for a union member, with that member."""
    while typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return False, annotation
    members = [m for m in typing.get_args(annotation) if m is not types.NoneType]
    if len(members) == 1:
        return _resolve(members[0], part)
    tagged = [m for m in members if isinstance(m, type) and issubclass(m, BaseModel)]
    return True, next((m for m in tagged if m.model_fields["kind"].default == part), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def shown(value: object) -> str:
    """A value as short as it fits in a sentence."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
