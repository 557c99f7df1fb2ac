"""Folders of images, one sub-folder per class, decoded by torchvision when a batch needs them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekd.data.augment import CenterCrop, RandomResizedCrop
from sparsekd.data.dataset import Dataset, Split, carve
from sparsekd.data.files import mismatch
from sparsekd.errors import DataError, UnsupportedError

_MEAN = torch.tensor([0.485, 0.456, 0.406]) * 255
_STD = torch.tensor([0.229, 0.224, 0.225]) * 255


class FolderImages:
    """Image files that are decoded on demand, in threads.

    Args:
        paths: the files.
        side: height and width of a decoded image: its shorter side is resized to this, and the
            central square taken.

    Shape:
        Indexing with int64 ``[B]`` gives uint8 ``[B, 3, side, side]``.
    """

    def __init__(self, paths: Sequence[str], side: int) -> None:
        self.paths = list(paths)
        self.side = side

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Tensor) -> Tensor:
        chosen = [self.paths[position] for position in index.tolist()]
        with ThreadPoolExecutor(max_workers=max(1, torch.get_num_threads())) as pool:
            return torch.stack(list(pool.map(self._decode, chosen)))

    def _decode(self, path: str) -> Tensor:
        from torchvision.datasets.folder import default_loader
        from torchvision.transforms import functional

        try:
            image = functional.resize(default_loader(path), [self.side])
        except OSError as error:
            raise DataError(f"{path}: expected an image; found it damaged ({error})") from error
        return functional.pil_to_tensor(functional.center_crop(image, [self.side]))


def load_imagefolder(
    root: Path | None,
    *,
    seed: int,
    val_fraction: float,
    image_size: int = 224,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Dataset:
    """Load ``root/train/<class>/...``, with ``root/test`` or ``root/val`` as the test split.

    Without ``root/test``, ``root/val`` is the test split (as for ImageNet, whose test labels are
    not public) and validation images are carved out of ``root/train``. With both folders, each is
    the split of its name, and `val_fraction` has no effect.

    Args:
        root: the folder.
        seed: chooses the validation images.
        val_fraction: share of the training images held out.
        image_size: height and width of a batch's images.
        scale: see `RandomResizedCrop`.
        ratio: see `RandomResizedCrop`.

    Returns:
        The data set; files are decoded when a batch needs them.

    Raises:
        UnsupportedError: torchvision is not installed, or not for this torch.
        DataError: no such folder, no images, or splits with different classes.
    """
    try:
        from torchvision.datasets import ImageFolder
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise UnsupportedError(
            f"name: imagefolder needs torchvision, which cannot be imported ({error}); install one "
            "that fits this torch with `pip install torchvision`, or choose another data set"
        ) from error
    if root is None:
        raise DataError("root: expected the folder that holds train/ and val/; got None")
    has_both = (root / "test").is_dir() and (root / "val").is_dir()
    train = _scan(ImageFolder, root / "train")
    test = _scan(ImageFolder, root / ("test" if (root / "test").is_dir() else "val"))
    if has_both:
        kept, val = torch.arange(len(train.samples)), _scan(ImageFolder, root / "val")
        held_out = torch.arange(len(val.samples))
    else:
        val = train
        kept, held_out = carve(len(train.samples), val_fraction, seed)
    for folder in (val, test):
        if folder.classes != train.classes:
            raise mismatch(
                folder.root, f"the {len(train.classes)} classes of train", folder.classes
            )

    # The margin that evaluation crops away is customary: 256 pixels for 224.
    side = round(image_size * 256 / 224)

    def split(folder: Any, index: Tensor) -> Split:
        samples = [folder.samples[position] for position in index.tolist()]
        return Split(
            FolderImages([path for path, _ in samples], side),
            torch.tensor([label for _, label in samples], dtype=torch.int64),
            _MEAN,
            _STD,
            RandomResizedCrop(image_size, scale, ratio),
            CenterCrop(image_size),
        )

    return Dataset(
        name="imagefolder",
        num_classes=len(train.classes),
        input_shape=(3, image_size, image_size),
        train=split(train, kept),
        val=split(val, held_out),
        test=split(test, torch.arange(len(test.samples))),
    )


def _scan(image_folder: Any, folder: Path) -> Any:
    try:
        return image_folder(str(folder))
    except FileNotFoundError as error:
        raise mismatch(folder, "a sub-folder of images for each class", error) from error
