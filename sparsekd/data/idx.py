"""Fashion-MNIST from IDX files, gzipped or not."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsekd.data.augment import CropFlip
from sparsekd.data.dataset import Dataset, build
from sparsekd.data.files import check_labels, check_sizes, mismatch
from sparsekd.errors import DataError

_SYSTEM_ROOT = Path("/usr/share/datasets/fashion-mnist")
_UNSIGNED_BYTE = 0x08
_OFFICIAL_SIZES = (60_000, 10_000)
_MEAN, _STD = 0.2860 * 255, 0.3530 * 255


def load_fashion_mnist(root: Path | None, *, seed: int, val_fraction: float) -> Dataset:
    """Load Fashion-MNIST from its four IDX files.

    Args:
        root: folder of the files, gzipped or not; None for the system's copy.
        seed: chooses the validation images.
        val_fraction: share of the training images held out.

    Returns:
        The data set.

    Raises:
        DataError: a missing, truncated, corrupt or mislabelled file.

    Source: Xiao et al., Fashion-MNIST (2017).
    """
    folder = root or _SYSTEM_ROOT
    train_path, train_images, train_labels = _read_pair(folder, "train")
    test_path, test_images, test_labels = _read_pair(folder, "t10k")
    check_sizes(train_path, test_path, (len(train_labels), len(test_labels)), _OFFICIAL_SIZES)
    return build(
        "fashion-mnist",
        10,
        (train_images, train_labels),
        (test_images, test_labels),
        CropFlip(padding=2),
        seed=seed,
        val_fraction=val_fraction,
        statistics=(torch.tensor([_MEAN]), torch.tensor([_STD])),
    )


def _read_pair(folder: Path, part: str) -> tuple[Path, Tensor, Tensor]:
    image_path = _find(folder, f"{part}-images-idx3-ubyte")
    label_path = _find(folder, f"{part}-labels-idx1-ubyte")
    images = read_idx(image_path, ndim=3)
    labels = read_idx(label_path, ndim=1).long()
    if images.shape[1:] != (28, 28):
        raise mismatch(image_path, "images of 28 x 28", " x ".join(map(str, images.shape[1:])))
    if len(images) != len(labels):
        raise mismatch(label_path, f"{len(images)} labels, one for each image", len(labels))
    check_labels(label_path, labels, 10)
    return image_path, images[:, None], labels


def _find(folder: Path, name: str) -> Path:
    candidates = (folder / f"{name}.gz", folder / name)
    for path in candidates:
        if path.is_file():
            return path
    raise DataError(f"{candidates[0]}: expected this file, or {name} beside it; found neither")


def read_idx(path: Path, ndim: int) -> Tensor:
    """Read an IDX file of unsigned bytes, gzipped if its name ends in .gz.

    Args:
        path: the file.
        ndim: number of axes it must have.

    Returns:
        The uint8 array.

    Raises:
        DataError: wrong magic number, truncated, too long or corrupt.

    Source: LeCun et al., the MNIST database, "File formats".
    """
    header_length = 4 + 4 * ndim
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(header_length)
            if len(header) < header_length:
                raise mismatch(path, f"a header of {header_length} bytes", f"{len(header)} bytes")
            magic, *shape = struct.unpack(f">{1 + ndim}I", header)
            expected_magic = _UNSIGNED_BYTE << 8 | ndim
            if magic != expected_magic:
                raise mismatch(path, f"magic number {expected_magic}", magic)
            length = math.prod(shape)
            # One byte more than announced: a longer file shows, and gzip gets to its checksum.
            # Chunks, because a damaged header may announce more than there is memory for.
            content = bytearray()
            while chunk := file.read(min(1 << 20, length + 1 - len(content))):
                content += chunk
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: expected a readable file; found it damaged ({error})") from error
    if len(content) != length:
        found = "more" if len(content) > length else f"{len(content)} bytes"
        raise mismatch(path, f"{length} bytes after the header, as it announces", found)
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8)).view(*shape)
