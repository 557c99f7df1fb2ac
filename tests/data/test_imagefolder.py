"""Folders of images: decoded by torchvision where it is installed, refused clearly where not."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsekd import data
from sparsekd.errors import DataError, UnsupportedError

SIZE = 28
OPTIONS = {"image_size": SIZE, "val_fraction": 0.25}


def test_without_torchvision_the_error_says_how(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(UnsupportedError, match="pip install torchvision"):
        data.load("imagefolder", root=tmp_path)


@pytest.fixture
def root(tmp_path, torchvision) -> Path:
    """Write 8 training and 4 test images of two classes; class b is the bright one."""
    image = pytest.importorskip("PIL.Image")
    random = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 2)):
        for name, low in (("a", 0), ("b", 128)):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(low, low + 128, (40, 50 + number, 3), dtype=np.uint8)
                image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path


def test_images_are_decoded_and_labelled(root):
    dataset = data.load("imagefolder", root=root, **OPTIONS)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (6, 2, 4)
    assert (dataset.num_classes, dataset.input_shape) == (2, (3, SIZE, SIZE))
    for augment in (False, True):
        for split in (dataset.train, dataset.val, dataset.test):
            for x, y in split.batches(3, augment=augment):
                assert x.shape == (len(y), 3, SIZE, SIZE)
                assert torch.equal((x.mean((1, 2, 3)) > 0.2).long(), y)


def test_a_batch_repeats_under_its_seed(root):
    train = data.load("imagefolder", root=root, **OPTIONS).train

    def epoch(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        batches = train.batches(4, shuffle=True, augment=True, generator=generator)
        return torch.cat([x for x, _ in batches])

    assert torch.equal(epoch(0), epoch(0))
    assert not torch.equal(epoch(0), epoch(1))


def test_a_test_folder_leaves_val_to_validation(root):
    (root / "val").rename(root / "test")
    for name in ("a", "b"):
        (root / "val" / name).mkdir(parents=True)
        (root / "train" / name / "0.png").rename(root / "val" / name / "0.png")
    dataset = data.load("imagefolder", root=root, **OPTIONS)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (6, 2, 4)


def test_a_damaged_image_is_named(root):
    path = root / "val" / "a" / "1.png"
    path.write_bytes(path.read_bytes()[:200])
    dataset = data.load("imagefolder", root=root, **OPTIONS)
    with pytest.raises(DataError, match=r"1\.png: expected an image"):
        list(dataset.test.batches(4))


def test_splits_must_have_the_same_classes(root):
    (root / "val" / "b").rename(root / "val" / "c")
    with pytest.raises(DataError, match=r"val: expected the 2 classes of train; found"):
        data.load("imagefolder", root=root, **OPTIONS)


def test_missing_parts(root):
    with pytest.raises(DataError, match=r"root: .*None"):
        data.load("imagefolder")
    (root / "train").rename(root / "elsewhere")
    with pytest.raises(DataError, match=r"train: expected a sub-folder"):
        data.load("imagefolder", root=root)
