"""Recipes in files: as by flags, and every mistake by its name."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from sparsekd.errors import UnavailableError
from sparsekd.recipes import RECIPES, get, override
from sparsekd.recipes.files import read_file, to_toml

_TOML = """
recipe = "rigl"
sparsities = [0.9, 0.98]
seeds = 3
[training]
lr = 0.05
milestones = [3, 5]
augment = false
[data]
train_images = 500
[kd]
until = "none"
"""
_YAML = """
recipe: rigl
sparsities: [0.9, 0.98]
seeds: 3
training: {lr: 5e-2, milestones: [3, 5], augment: false}
data:
  train_images: 500
kd: {until: null}
"""


@pytest.mark.parametrize("name, text", [("mine.toml", _TOML), ("mine.yaml", _YAML)])
def test_a_file_says_what_flags_say(tmp_path, name, text):
    if "yaml" in name:
        pytest.importorskip("yaml", reason="reads YAML")
    path = tmp_path / name
    path.write_text(text)
    expected = get("rigl")
    for assignment in (
        "sparsities=0.9,0.98",
        "seeds=3",
        "training.lr=0.05",
        "training.milestones=3,5",
        "training.augment=false",
        "data.train_images=500",
        "kd.until=none",
    ):
        expected = override(expected, assignment)
    assert read_file(path) == replace(expected, name="mine")


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_goes_through_a_file_unchanged(tmp_path, name):
    path = tmp_path / f"{name}.toml"
    path.write_text(to_toml(get(name)))
    assert read_file(path) == get(name)


@pytest.mark.parametrize(
    "text, message",
    [
        ("seeds = 3", "recipe: expected the recipe to start from"),
        ('recipe = "demmo"', "expected one of demo"),
        ('recipe = "demo"\nseed = 3', "seed: no field 'seed', .*; did you mean seeds"),
        ('recipe = "demo"\ntraining = 3', "training: expected one of its fields"),
        ('recipe = "demo"\nseeds = {a = 1}', "'seeds' is a value and has no fields"),
        (
            'recipe = "demo"\n[training]\nlr = "fast"',
            r"training\.lr: expected a number",
        ),
        ('recipe = "demo"\nseeds = 1.5', "seeds: expected a whole number, got '1.5'"),
        ("recipe = ", "Invalid value"),
    ],
)
def test_a_mistake_names_the_file_and_the_field(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_file(path)
    assert str(error.value).startswith(f"{path}: ")


def test_yaml_without_its_package_names_the_extra(tmp_path, monkeypatch):
    path = tmp_path / "mine.yaml"
    path.write_text("recipe: demo")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(UnavailableError, match=r"pip install 'sparsekd\[yaml\]'"):
        read_file(path)
