"""Fields of a recipe, changed by their dotted names."""

from __future__ import annotations

import pytest

from sparsekd.recipes import (
    get,
    override,
)


@pytest.mark.parametrize(
    "assignment, path, value",
    [
        ("training.lr=0.05", ("training", "lr"), 0.05),
        ("training.epochs=3", ("training", "epochs"), 3),
        ("training.nesterov=True", ("training", "nesterov"), True),
        ("training.milestones=4, 6", ("training", "milestones"), (4, 6)),
        ("training.milestones=", ("training", "milestones"), ()),
        ("training.schedule=step", ("training", "schedule"), "step"),
        ("kd.until=7", ("kd", "until"), 7),
        ("kd.until=none", ("kd", "until"), None),
        ("data.scale=0.1,1", ("data", "scale"), (0.1, 1.0)),
        ("sparsities=0.5,0.75", ("sparsities",), (0.5, 0.75)),
        ("methods=kd", ("methods",), ("kd",)),
        ("model.stem=imagenet", ("model", "stem"), "imagenet"),
    ],
)
def test_overrides(assignment, path, value):
    changed = override(get("demo"), assignment)
    for name in path:
        changed = getattr(changed, name)
    assert changed == value
    assert type(changed) is type(value)


@pytest.mark.parametrize(
    "assignment, message",
    [
        ("training.lr", "expected a.b=value"),
        ("training.lrr=1", "did you mean lr"),
        ("train.lr=1", "did you mean training"),
        ("training=1", "expected one of its fields"),
        ("seeds.x=1", "has no fields"),
        ("training.lr=fast", "training.lr: expected a number, got 'fast'"),
        ("training.epochs=2.5", "training.epochs: expected a whole number"),
        ("training.nesterov=yes", "expected true or false"),
        ("training.schedule=linear", "'step' or 'cosine'"),
        ("training.milestones=1,b", "expected a whole number, got 'b'"),
        ("training.lr=-1", "lr: expected a positive number"),
        ("methods=lt,foo", "got 'foo'"),
        ("sparsities=1.0", "sparsities"),
        ("seeds=0", "seeds"),
        ("kd.alpha=2", "alpha"),
        ("rewind_epoch=99", "rewind_epoch"),
    ],
)
def test_overrides_that_cannot_be(assignment, message):
    with pytest.raises(ValueError, match=message):
        override(get("demo"), assignment)
