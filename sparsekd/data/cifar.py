"""CIFAR-10 and CIFAR-100 from the binary and the Python distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsekd.data.augment import CropFlip
from sparsekd.data.dataset import Dataset, build
from sparsekd.data.files import check_labels, check_sizes, locate, mismatch
from sparsekd.data.pickles import read_pickle
from sparsekd.errors import DataError

_PIXELS = 3 * 32 * 32
_OFFICIAL_SIZES = (50_000, 10_000)


@dataclass(frozen=True)
class _Layout:
    """File names, folders, label format and pixel statistics of one data set."""

    name: str
    num_classes: int
    train_files: tuple[str, ...]
    test_file: str
    folders: tuple[str, str]  # binary, python
    label_bytes: int  # of a binary record; the last one is the label used
    label_key: str  # of the Python distribution
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


_CIFAR10 = _Layout(
    name="cifar10",
    num_classes=10,
    train_files=tuple(f"data_batch_{number}" for number in range(1, 6)),
    test_file="test_batch",
    folders=("cifar-10-batches-bin", "cifar-10-batches-py"),
    label_bytes=1,
    label_key="labels",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)
_CIFAR100 = _Layout(
    name="cifar100",
    num_classes=100,
    train_files=("train",),
    test_file="test",
    folders=("cifar-100-binary", "cifar-100-python"),
    label_bytes=2,
    label_key="fine_labels",
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)


def load_cifar10(root: Path | None, *, seed: int, val_fraction: float) -> Dataset:
    """Load CIFAR-10 from the extracted binary or Python distribution.

    Args:
        root: the folder of the batch files, or the one above it.
        seed: chooses the validation images.
        val_fraction: share of the training images held out.

    Returns:
        The data set.

    Raises:
        DataError: a missing, truncated, corrupt or mislabelled file.

    Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009).
    """
    return _load(_CIFAR10, root, seed, val_fraction)


def load_cifar100(root: Path | None, *, seed: int, val_fraction: float) -> Dataset:
    """Load CIFAR-100 with its 100 fine labels.

    Args:
        root: the folder of the train and test files, or the one above it.
        seed: chooses the validation images.
        val_fraction: share of the training images held out.

    Returns:
        The data set.

    Raises:
        DataError: a missing, truncated, corrupt or mislabelled file.

    Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009).
    """
    return _load(_CIFAR100, root, seed, val_fraction)


def _load(layout: _Layout, root: Path | None, seed: int, val_fraction: float) -> Dataset:
    if root is None:
        raise DataError(f"root: expected the folder with the files of {layout.name}; got None")
    names = (*layout.train_files, layout.test_file)
    binary_folder, python_folder = layout.folders
    paths = locate([root, root / binary_folder], [f"{name}.bin" for name in names])
    if paths:
        parts = [_read_binary(path, layout) for path in paths]
    else:
        paths = locate([root, root / python_folder], names)
        parts = [_read_python(path, layout) for path in paths]
    if not paths:
        raise mismatch(
            root,
            f"the extracted files {names[0]}.bin ... or {names[0]} ... of {layout.name}, "
            f"here or in {binary_folder} or {python_folder}",
            "none of them",
        )
    for path, (_, labels) in zip(paths, parts, strict=True):
        check_labels(path, labels, layout.num_classes)
    *train_parts, test = parts
    _check_equal(paths[:-1], train_parts)
    train = tuple(torch.cat(tensors) for tensors in zip(*train_parts, strict=True))
    check_sizes(paths[0], paths[-1], (len(train[1]), len(test[1])), _OFFICIAL_SIZES)
    return build(
        layout.name,
        layout.num_classes,
        (train[0], train[1]),
        test,
        CropFlip(padding=4),
        seed=seed,
        val_fraction=val_fraction,
        statistics=(torch.tensor(layout.mean) * 255, torch.tensor(layout.std) * 255),
    )


def _check_equal(paths: Sequence[Path], parts: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Refuse training batches of unequal length: a shorter one has been cut."""
    longest = max(len(labels) for _, labels in parts)
    for path, (_, labels) in zip(paths, parts, strict=True):
        if len(labels) != longest:
            raise mismatch(path, f"{longest} images, as the other batches have", len(labels))


def _read_binary(path: Path, layout: _Layout) -> tuple[Tensor, Tensor]:
    record = layout.label_bytes + _PIXELS
    try:
        content = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise DataError(f"{path}: expected a readable file; found it damaged ({error})") from error
    if content.size == 0 or content.size % record:
        raise mismatch(path, f"a multiple of {record} bytes", f"{content.size} bytes")
    records = torch.from_numpy(content).view(-1, record)
    images = records[:, layout.label_bytes :].reshape(-1, 3, 32, 32)
    return images, records[:, layout.label_bytes - 1].long()


def _read_python(path: Path, layout: _Layout) -> tuple[Tensor, Tensor]:
    content = read_pickle(path)
    if not isinstance(content, dict):
        raise mismatch(path, "a pickled dict", type(content).__name__)
    fields = {
        key.decode("latin1") if isinstance(key, bytes) else key: value
        for key, value in content.items()
    }
    for key in ("data", layout.label_key):
        if key not in fields:
            raise mismatch(path, f"an entry {key!r}", sorted(map(str, fields)))
    images, labels = fields["data"], fields[layout.label_key]
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        raise mismatch(path, "a uint8 array 'data'", getattr(images, "dtype", type(images)))
    if images.ndim != 2 or images.shape[1] != _PIXELS:
        raise mismatch(path, f"'data' of shape [N, {_PIXELS}]", list(images.shape))
    if isinstance(labels, np.ndarray) and labels.ndim == 1:
        labels = labels.tolist()
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise mismatch(path, f"a list of integers {layout.label_key!r}", type(labels).__name__)
    if len(labels) != len(images):
        raise mismatch(path, f"{len(images)} labels, one for each image", len(labels))
    if labels and not -(2**63) <= min(labels) <= max(labels) < 2**63:
        raise mismatch(path, f"labels from 0 to {layout.num_classes - 1}", max(labels, key=abs))
    return torch.from_numpy(images).view(-1, 3, 32, 32), torch.tensor(labels, dtype=torch.int64)
