"""Every recipe that is shipped fits every cluster file that is shipped."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from nebula.config import agree
from nebula.recipe import load_federation, load_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "trainers").glob("*.py"))
CLUSTERS = sorted((ROOT / "clusters").glob("*.yaml"))


def test_there_are_some():
    assert {path.stem for path in RECIPES} >= {"code_moe"}
    assert {path.stem for path in CLUSTERS} >= {"laptop", "two_sites"}


@pytest.mark.parametrize("clusters", CLUSTERS, ids=lambda p: p.stem)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_they_fit_together(recipe, clusters):
    agreement = agree(load_recipe(recipe), load_federation(clusters), tokenizer="", unigram_entropy=0.0)
    assert agreement.parse(agreement.canonical()) == agreement
    assert all(agreement.tokens_per_round(name) > 0 for name in agreement.members)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_names_its_command_and_imports_only_config(recipe):
    tree = ast.parse(recipe.read_text())
    assert f"nebula run trainers/{recipe.name} --clusters clusters/" in (ast.get_docstring(tree) or "")
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= {"nebula.config", "__future__"}
    assert not any(isinstance(node, ast.Import) for node in ast.walk(tree))
