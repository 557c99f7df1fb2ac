"""Choices between the blocked layout and ordinary ops: kept, found again, told from others."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsekd.ops.dispatch.blocks import BlockChooser, BlockTimes
from sparsekd.ops.dispatch.cache_key import Key
from sparsekd.ops.store import Store

LAYOUT, ORDINARY, EVEN = BlockTimes(1.0, 2.0), BlockTimes(2.0, 1.0), BlockTimes(1.0, 1.02)


class Call:
    def __init__(self) -> None:
        self.runs = 0

    def __call__(self) -> None:
        self.runs += 1


def chooser(path: Path | None = None) -> BlockChooser:
    return BlockChooser(Store(path, BlockTimes.of))


def known(*entries: tuple[tuple[int, int], BlockTimes]) -> BlockChooser:
    made = chooser()
    for step, times in entries:
        made.store.add("block", step, times)
    return made


def ask(made: BlockChooser, step: tuple[int, int], kind: str = "block") -> tuple[bool, bool]:
    """Return the choice, and whether it was measured for it."""
    layout, ordinary = Call(), Call()
    wins = made.layout_wins(Key(kind, step), layout, ordinary)
    assert bool(layout.runs) == bool(ordinary.runs)
    return wins, bool(layout.runs)


def test_ties_go_to_ordinary_ops() -> None:
    assert LAYOUT.layout
    assert not ORDINARY.layout
    assert not EVEN.layout


def test_a_new_key_is_measured_once_and_kept_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "blocks.jsonl"
    first = chooser(path)
    wins, measured = ask(first, (-3, 14))
    assert measured
    assert wins == first.store.get("block", (-3, 14)).layout
    assert ask(first, (-3, 14)) == (wins, False)
    assert ask(chooser(path), (-3, 14)) == (wins, False)
    assert ask(first, (-3, 15))[1]
    assert ask(first, (-3, 14), "another block")[1]


def test_a_choice_tells_others_of_the_same_size() -> None:
    made = known(((-4, 14), LAYOUT), ((0, 14), ORDINARY))
    assert ask(made, (-9, 14)) == (True, False)
    assert ask(made, (5, 14)) == (False, False)
    assert ask(made, (-2, 14))[1]
    assert ask(made, (-9, 15))[1]


def test_choices_that_contradict_each_other_tell_nothing() -> None:
    made = known(((0, 14), LAYOUT), ((-4, 14), ORDINARY))
    assert ask(made, (-2, 14))[1]
    assert ask(made, (-6, 14)) == (True, False)


@pytest.mark.parametrize("value", ["0", "-1.0", "NaN", "Infinity", '"x"', "null"])
def test_damaged_lines_are_skipped(value: str, tmp_path: Path) -> None:
    path = tmp_path / "blocks.jsonl"
    line = '{"kind": "block", "step": [0, 14], "round": 1, "layout_ms": %s, "ordinary_ms": 1.0}\n'
    path.write_text(line % value)
    assert ask(chooser(path), (0, 14))[1]
    path.write_text(line % "9.0")
    assert ask(chooser(path), (0, 14)) == (False, False)
