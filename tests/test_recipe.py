from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula import config
from nebula.config import SGD, Blockwise, Run
from nebula.errors import UsageError
from nebula.recipe import load_federation, load_recipe
from nebula.strict import parse_yaml

RECIPE = "from nebula.config import *\n\ndef recipe():\n    return Run(name='toy'{})\n"
NORTH = "clusters: {north: {ranks: 2}}"


@pytest.fixture
def recipe(tmp_path):
    def load(arguments="", *overrides, source=None):
        path = tmp_path / "r.py"
        path.write_text(RECIPE.format(arguments) if source is None else source)
        return load_recipe(path, overrides)

    return load


@pytest.fixture
def federation(tmp_path):
    def load(text, *overrides):
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return load_federation(path, overrides)

    return load


def refusal(act, *arguments, **named):
    with pytest.raises(UsageError) as caught:
        act(*arguments, **named)
    assert caught.value.hint
    return caught.value


# --- recipes ------------------------------------------------------------------------------------------------------


def test_a_recipe_is_executed(recipe):
    assert recipe(", rounds=3") == Run(name="toy", rounds=3)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("def recipe(:", ":1): SyntaxError"),
        ("x = 1", "defines no function recipe()"),
        ("recipe = 3", "defines no function recipe()"),
        ("def recipe():\n    return 3", "recipe() returned int"),
        ("def recipe():\n    x = 1\n    return x / 0", ":3): ZeroDivisionError: division by zero"),
        ("import json\n\ndef recipe():\n    return json.loads('{')", ":4): JSONDecodeError"),
        ("import no_such_module", ":1): ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise SystemExit(3)", ":1): SystemExit: 3"),
        (RECIPE.format(", model=Model(dims=3)"), "r.py:4: Model.dims): the keys here are vocab"),
        (RECIPE.format(", model=Model(dim=100)"), "r.py:4: Model): dim 100 must split into heads 4"),
        (RECIPE.format(", seed='a'"), "wrong value 'a' ("),
        (RECIPE.format("").replace("toy", "Bad Name"), "Run.name): expected lower-case letters"),
    ],
)
def test_a_bad_recipe_is_told_with_its_line(recipe, source, told):
    error = refusal(recipe, source=source)
    assert told in error.message
    assert "r.py" in error.message
    assert "Traceback" not in error.message
    assert "pydantic" not in error.message


def test_an_unknown_argument_gets_did_you_mean(recipe):
    assert refusal(recipe, ", inner_stepz=3").hint == "did you mean 'inner_steps'?"


def test_a_missing_recipe_names_its_neighbour(tmp_path):
    (tmp_path / "code_moe.py").write_text("")
    assert "code_moe.py" in refusal(load_recipe, tmp_path / "code_mo.py").hint


# --- overrides ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("optimizer.lr=3e-3", lambda r: r.optimizer.lr, 3e-3),
        ("rounds=4", lambda r: r.rounds, 4),
        ("optimizer.clip=null", lambda r: r.optimizer.clip, None),
        ("data.path=[a, b]", lambda r: r.data.path, ("a", "b")),
        ("data.path=no", lambda r: r.data.path, "no"),
        ("wan.up.steps.0.bits=8", lambda r: r.wan.up.steps[0].bits, 8),
        ("wan.down.steps=[{kind: blockwise}]", lambda r: r.wan.down.steps, (Blockwise(),)),
        ("optimizer.betas=[0.8, 0.9]", lambda r: r.optimizer.betas, (0.8, 0.9)),
    ],
)
def test_an_override_reaches_its_key_and_no_other(recipe, override, read, value):
    changed = recipe("", override)
    assert read(changed) == value
    top = override.split(".")[0].split("=")[0]
    rest = set(Run.model_fields) - {top}
    assert changed.model_dump(include=rest) == recipe().model_dump(include=rest)


def test_a_new_kind_takes_its_own_defaults_in_any_order(recipe):
    assert recipe("", "optimizer.kind=sgd").optimizer == SGD()
    assert recipe("", "optimizer.lr=0.5", "optimizer.kind=sgd").optimizer == SGD(lr=0.5)


def test_values_that_only_fit_together_are_set_together(recipe):
    assert recipe("", "model.dim=80", "model.heads=5", "model.kv_heads=5").model.heads == 5


@pytest.mark.parametrize(
    ("override", "told", "hint"),
    [
        ("modle.dim=3", "unknown key 'modle' (--set: modle)", "did you mean 'model'?"),
        ("optimizer.lrr=1", "unknown key 'lrr' (--set: optimizer.lrr)", "did you mean 'lr'?"),
        ("optimizer.kind=sdg", "unknown kind 'sdg' (--set: optimizer.kind)", "did you mean 'sgd'?"),
        ("wan.up.steps.0.bit=8", "(--set: wan.up.steps.0.bit)", "did you mean 'bits'?"),
        ("wan.up.steps.7.bits=8", "the keys here are 0", "correct its spelling"),
        ("rounds=3.5", "wrong value 3.5 (--set: rounds): expected a whole number", "correct rounds"),
        ("rounds=0", "expected greater than 0", "correct rounds"),
        ("rounds.x=1", "10 has no keys", "correct its spelling"),
        ("model.dim=100", "(--set: model): dim 100 must split", "change one of them"),
        ("fragments=9", "(--set: fragments): fragments 9 exceeds model.layers 4", "change one of them"),
        ("rounds", "not of the form key=value", "for example --set optimizer.lr=0.001"),
        ("a..b=1", "not of the form key=value", "for example --set optimizer.lr=0.001"),
        ("rounds=[1", "not valid YAML (--set: rounds", "correct that line"),
    ],
)
def test_a_bad_override_is_refused(recipe, override, told, hint):
    error = refusal(recipe, "", override)
    assert told in error.message
    assert error.hint == hint


# --- cluster files ------------------------------------------------------------------------------------------------


def test_overrides_reach_a_cluster_and_an_absent_link(federation):
    changed = federation(NORTH, "clusters.north.ranks=4", "clusters.north.link.rtt_ms=5", "clusters.north.link.loss=0")
    assert changed.clusters["north"].ranks == 4
    assert changed.clusters["north"].link.rtt_ms == 5


def test_an_override_adds_no_cluster(federation):
    assert refusal(federation, NORTH, "clusters.nort.ranks=4").hint == "did you mean 'north'?"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("clusters: {north: {rank: 2}}", "unknown key 'rank' ("),
        ("clusters: {north: {ranks: two}}", "c.yaml: clusters.north.ranks): expected a whole number"),
        ("clusters: {north: {device: gpu}}", "wrong value 'gpu' ("),
        ("clusters: {North: {ranks: 2}}", "c.yaml: clusters.North): expected lower-case"),
        ("clusters: {coordinator: {ranks: 2}}", "may not be called 'coordinator'"),
        ("clusters: {north: {ranks: 2, batch: 3}}", "must be a multiple of its ranks 2"),
        ("clusters: {}", "clusters): expected at least 1"),
        ("{}", "missing key 'clusters'"),
        ("clusters:\n  north: {}\n  north: {}", "c.yaml:3): the key 'north' is there twice"),
        ("a: &a [x]\nb: *a", "c.yaml:2): aliases (*name) are not allowed"),
        ("a: !!python/object/apply:os.getcwd []", "tags such as"),
        ("[" * 1000, "nested more than 32 deep"),
        ("? [a]\n: 1", "a key must be a word"),
        ("a: 1\n---\nb: 2", "another document"),
        ("a: [1\nb: 2", "not valid YAML"),
        ("a: \x01", "not valid YAML"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("", "not a cluster file"),
        ("- 1", "not a cluster file"),
    ],
)
def test_a_bad_cluster_file_is_refused(federation, text, told):
    error = refusal(federation, text)
    assert told in error.message
    assert "c.yaml" in error.message


def test_several_mistakes_are_told_at_once(federation):
    error = refusal(federation, "clusters: {north: {ranks: 0, device: gpu, link: {loss: 2}}}")
    assert error.message.startswith("3 things are wrong:")
    assert all(key in error.message for key in ("clusters.north.ranks", "north.device", "north.link.loss"))


def test_a_large_or_binary_file_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(b"#" * ((1 << 20) + 1))
    assert "cluster file too large" in refusal(load_federation, path).message
    path.write_bytes(b"\xff\xfe\x00")
    assert "cannot read the cluster file" in refusal(load_federation, path).message


# --- YAML ---------------------------------------------------------------------------------------------------------


def test_scalars_are_those_of_yaml_1_2():
    text = "{a: no, b: on, c: 12:30, d: 2020-01-01, e: 3e-3, f: 0x10, g: 010, h: true, i: ~, j: -1.5, k: .inf, on: 1}"
    assert parse_yaml(text, "here") == {
        "a": "no",
        "b": "on",
        "c": "12:30",
        "d": "2020-01-01",
        "e": 3e-3,
        "f": "0x10",
        "g": "010",
        "h": True,
        "i": None,
        "j": -1.5,
        "k": ".inf",
        "on": 1,
    }


TEXT = st.text(st.characters(max_codepoint=0xFFFF), max_size=8)
"""JSON writes the rest as surrogate pairs, which YAML has not."""

NUMBER = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(PLAIN)
def test_json_is_yaml(value):
    assert parse_yaml(json.dumps(value), "here") == value


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_text_parses_or_is_refused(text):
    with contextlib.suppress(UsageError):
        json.dumps(parse_yaml(text, "here"))


# --- what follows from the codec ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "feedback", "outer"),
    [
        ((config.Adaptive(bits=0.1),), 0.95, config.Nesterov(lr=1.0, momentum=0.474)),
        ((config.Adaptive(bits=1.0),), 0.95, config.Nesterov(lr=1.0, momentum=0.15)),
        ((config.Adaptive(bits=2.0),), 1.0, config.Nesterov()),
        ((config.Blockwise(bits=4), config.Zstd()), 1.0, config.Nesterov()),
        ((config.Blockwise(bits=1),), 0.95, config.OuterSGD(lr=1.0)),
        ((config.TopK(),), 0.95, config.OuterSGD(lr=1.0)),
    ],
)
def test_feedback_and_outer_rule_follow_from_the_codec_unless_given(steps, feedback, outer):
    wan = config.Wan(up=config.Codec(steps=steps))
    assert wan.up.feedback == feedback
    assert config.Run(name="x", wan=wan).outer == outer
    plain = config.Codec(steps=steps, feedback=None)
    chosen = config.Run(name="x", wan=config.Wan(up=plain), outer=config.Nesterov())
    assert (chosen.wan.up.feedback, chosen.outer) == (None, config.Nesterov())
    assert config.Run.model_validate_json(chosen.model_dump_json()) == chosen
