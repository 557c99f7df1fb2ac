"""Windows of text: what they hold, that splits are disjoint, and texts that are too short."""

from __future__ import annotations

import pytest
import torch

from sparsekd import data
from sparsekd.data.text import CHARACTERS
from sparsekd.errors import DataError


def decoded(codes: torch.Tensor) -> str:
    return "".join(CHARACTERS[int(code)] for code in codes)


def test_windows_are_of_the_text_and_labels_follow_them(tmp_path):
    train, test = "abcdefghij" * 90, "0123456789" * 10
    (tmp_path / "b.txt").write_text(test[2:])
    (tmp_path / "a.txt").write_text(train)
    (tmp_path / "c.md").write_text("not read")
    found = data.load("text", root=tmp_path, context=7, train_size=60, test_size=20)
    assert (found.num_classes, found.input_shape) == (96, (1, 1, 7))
    sizes = len(found.train), len(found.val), len(found.test)
    assert sizes == (54, 6, 20)
    for split, source in ((found.train, train), (found.test, "\n\n" + test[2:])):
        for x, y in split.batches(9):
            assert x.dtype == torch.float32
            assert y.dtype == torch.int64
            for window, label in zip(x, y, strict=True):
                assert decoded(window.flatten()) + CHARACTERS[label] in source


def test_what_is_not_ascii_is_a_space(tmp_path):
    (tmp_path / "a.txt").write_text("\tx\u00e9y" * 100, encoding="utf-8")
    found = data.load("text", root=tmp_path, context=3, train_size=5, test_size=5)
    assert set(decoded(found.test.images.flatten())) <= set(" xy")


def test_the_help_of_python_is_there_and_the_same_for_every_seed():
    one, other = (data.load("text", seed=seed, val_fraction=0.0) for seed in (0, 1))
    assert (len(one.train), len(one.test)) == (10_000, 1_000)
    assert torch.equal(one.train.images, other.train.images)
    assert "statement" in decoded(one.train.images.flatten())


def test_texts_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"expected \.txt files"):
        data.load("text", root=tmp_path)
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(DataError, match="expected at least 330 characters, got 5"):
        data.load("text", root=tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff" * 1000)
    with pytest.raises(DataError, match="UTF-8"):
        data.load("text", root=tmp_path)
