"""Folders of images, one sub-folder per class, by torchvision: its ImageFolder and transforms."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekd.data.dataset import Dataset, carve
from sparsekd.data.files import mismatch
from sparsekd.data.samples import Samples
from sparsekd.errors import DataError, UnsupportedError

_MEAN = torch.tensor([0.485, 0.456, 0.406]) * 255
_STD = torch.tensor([0.229, 0.224, 0.225]) * 255


def load_imagefolder(
    root: Path | None,
    *,
    seed: int,
    val_fraction: float,
    image_size: int = 224,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    workers: int | None = None,
) -> Dataset:
    """Load ``root/train/<class>/...``, with ``root/test`` or ``root/val`` as the test split.

    Without ``root/test``, ``root/val`` is the test split (as for ImageNet, whose test labels are
    not public) and validation images are carved out of ``root/train``. With both folders, each is
    the split of its name, and `val_fraction` has no effect.

    Training takes a random box of the whole image, resized and mirrored at random; evaluation the
    central square after the shorter side was resized to 256/224 of `image_size`.

    Args:
        root: the folder.
        seed: chooses the validation images.
        val_fraction: share of the training images held out.
        image_size: height and width of a batch's images.
        scale: range of the box's share of the image, of torchvision's RandomResizedCrop.
        ratio: range of the box's width over its height.
        workers: processes that decode; see `Samples`.

    Returns:
        The data set; files are decoded when a batch needs them.

    Raises:
        UnsupportedError: torchvision is not installed, or not for this torch.
        DataError: no such folder, no images, or splits with different classes. Batches raise it
            for a damaged file.

    Source: Szegedy et al., Going Deeper with Convolutions (2015), section 6.
    """
    try:
        from torchvision.transforms import v2
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise UnsupportedError(
            f"name: imagefolder needs torchvision, which cannot be imported ({error}); "
            "`pip install 'sparsekd[images]'` brings it; it has to be built for this torch, as "
            "both from the same index are"
        ) from error
    if root is None:
        raise DataError("root: expected the folder that holds train/ and val/; got None")
    has_both = (root / "test").is_dir() and (root / "val").is_dir()
    train = _scan(root / "train")
    test = _scan(root / ("test" if (root / "test").is_dir() else "val"))
    if has_both:
        kept, val = torch.arange(len(train)), _scan(root / "val")
        held_out = torch.arange(len(val))
    else:
        val = train
        kept, held_out = carve(len(train), val_fraction, seed)
    for folder in (val, test):
        if folder.classes != train.classes:
            raise mismatch(
                folder.root, f"the {len(train.classes)} classes of train", folder.classes
            )

    augment = [v2.RandomResizedCrop(image_size, scale, ratio), v2.RandomHorizontalFlip()]
    prepare = [v2.Resize(round(image_size * 256 / 224)), v2.CenterCrop(image_size)]

    def view(folder: Any, transforms: list[Any]) -> Any:
        seen = copy.copy(folder)  # with the same list of files
        seen.transform = v2.Compose([*transforms, v2.PILToTensor()])
        return seen

    def split(folder: Any, index: Tensor) -> Samples:
        views = view(folder, augment), view(folder, prepare)
        return Samples(*views, mean=_MEAN, std=_STD, workers=workers).subset(index)

    return Dataset(
        name="imagefolder",
        num_classes=len(train.classes),
        input_shape=(3, image_size, image_size),
        train=split(train, kept),
        val=split(val, held_out),
        test=split(test, torch.arange(len(test))),
    )


def _scan(folder: Path) -> Any:
    from torchvision.datasets import ImageFolder

    try:
        return ImageFolder(str(folder), loader=_decode)
    except FileNotFoundError as error:
        raise mismatch(folder, "a sub-folder of images for each class", error) from error


def _decode(path: str) -> Any:
    from torchvision.datasets.folder import default_loader

    try:
        return default_loader(path)
    except Exception as error:  # decoders raise many kinds for damaged bytes
        raise mismatch(path, "an image", f"it damaged ({error})") from error
