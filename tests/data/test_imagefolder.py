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
    with pytest.raises(UnsupportedError, match=r"pip install .sparsekd\[images\]"):
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


def test_evaluation_is_the_transform_of_torchvisions_references(root, torchvision):
    from torchvision.transforms import v2

    (x, _) = next(iter(data.load("imagefolder", root=root, **OPTIONS).test.batches(4)))
    prepare = v2.Compose(
        [
            v2.Resize(SIZE * 256 // 224),
            v2.CenterCrop(SIZE),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    reference = torchvision.datasets.ImageFolder(root / "val", prepare)
    torch.testing.assert_close(x, torch.stack([image for image, _ in reference]))


def test_training_is_the_transform_of_torchvisions_references(root, torchvision):
    """Whose boxes are of the whole file: with scale 1 they come from beyond the central square."""
    from torchvision.transforms import v2

    options = {**OPTIONS, "scale": (0.3, 0.9), "val_fraction": 0.0, "workers": 0}
    train = data.load("imagefolder", root=root, **options).train
    draws = torch.Generator().manual_seed(0)
    ((x, y),) = train.batches(8, augment=True, generator=draws)
    augment = v2.Compose(
        [v2.RandomResizedCrop(SIZE, (0.3, 0.9)), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    )
    reference = torchvision.datasets.ImageFolder(root / "train", augment)
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(0)))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1) * 255
    for index in range(8):
        torch.manual_seed(seed + index)
        image, label = reference[index]
        torch.testing.assert_close(x[index], (image - mean) / std)
        assert label == y[index]


def test_crops_come_from_the_whole_image(tmp_path, torchvision):
    """A wide image whose ends are white: crops beside the central square see them."""
    image = pytest.importorskip("PIL.Image")
    pixels = np.zeros((32, 128, 3), dtype=np.uint8)
    pixels[:, :40] = pixels[:, -40:] = 255
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        for number in range(40):
            image.fromarray(pixels).save(tmp_path / part / "a" / f"{number}.png")
    train = data.load("imagefolder", root=tmp_path, val_fraction=0.0, image_size=SIZE).train
    ((x, _),) = train.batches(40, augment=True, generator=torch.Generator().manual_seed(0))
    white = (255 - 0.485 * 255) / (0.229 * 255)
    assert (x[:, 0] > white - 0.1).flatten(1).any(1).float().mean() > 0.5
    ((x, _),) = train.batches(40)
    assert x[:, 0].max() < 0


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_epoch_is_the_same_for_any_number_of_workers(root, workers):
    def epoch(workers, start=0):
        train = data.load("imagefolder", root=root, workers=workers, **OPTIONS).train
        generator = torch.Generator().manual_seed(3)
        options = {"shuffle": True, "augment": True, "generator": generator, "start": start}
        return torch.cat([x for x, _ in train.batches(2, **options)])

    assert torch.equal(epoch(workers), epoch(0))
    assert torch.equal(epoch(workers, start=2), epoch(0)[4:])


def test_a_test_folder_leaves_val_to_validation(root):
    (root / "val").rename(root / "test")
    for name in ("a", "b"):
        (root / "val" / name).mkdir(parents=True)
        (root / "train" / name / "0.png").rename(root / "val" / name / "0.png")
    dataset = data.load("imagefolder", root=root, **OPTIONS)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (6, 2, 4)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kept", [0, 4, 60, 200, -60])
def test_a_damaged_image_is_named(root, workers, kept):
    path = root / "val" / "a" / "1.png"
    path.write_bytes(path.read_bytes()[:kept])
    dataset = data.load("imagefolder", root=root, workers=workers, **OPTIONS)
    with pytest.raises(
        DataError, match=r"^\S+a/1\.png: expected an image; found it damaged \(.*\)$"
    ):
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
