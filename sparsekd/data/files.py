"""Checks shared by the readers of files; errors name the file, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from sparsekd.errors import DataError


def mismatch(path: Path | str, expected: object, found: object) -> DataError:
    """Build the error for a file with unexpected content.

    Args:
        path: the file.
        expected: what it should hold.
        found: what it holds.

    Returns:
        The error, to be raised by the caller.

    Example:
        >>> str(mismatch("a.bin", "3073 bytes", "12 bytes"))
        'a.bin: expected 3073 bytes; found 12 bytes'
    """
    return DataError(f"{path}: expected {expected}; found {found}")


def locate(folders: Sequence[Path], names: Sequence[str]) -> list[Path]:
    """Find the folder that holds a set of files.

    Args:
        folders: candidates, best first.
        names: the files that belong together.

    Returns:
        The paths in the first folder that has any of the files, or an empty list.

    Raises:
        DataError: that folder lacks some of the files.

    Example:
        >>> locate([Path("/nowhere")], ["train.bin"])
        []
    """
    for folder in folders:
        paths = [folder / name for name in names]
        missing = [path for path in paths if not path.is_file()]
        if len(missing) == len(paths):
            continue
        if missing:
            raise mismatch(missing[0], f"a file beside {', '.join(names)}", "none")
        return paths
    return []


def check_labels(path: Path, labels: torch.Tensor, num_classes: int) -> None:
    """Refuse labels outside 0 ... num_classes - 1.

    Args:
        path: the file they come from.
        labels: integers ``[N]``.
        num_classes: number of classes.

    Raises:
        DataError: a label is out of range; the message gives its position and value.

    Example:
        >>> check_labels(Path("a"), torch.tensor([0, 9]), 10)
    """
    wrong = ((labels < 0) | (labels >= num_classes)).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise mismatch(
            path, f"labels from 0 to {num_classes - 1}", f"{int(labels[at])} at position {at}"
        )


def check_sizes(train: Path, test: Path, found: tuple[int, int], official: tuple[int, int]) -> None:
    """Refuse a data set with one part of official size and one that is not: that one is incomplete.

    A reduced copy, in which neither part has its official size, is accepted.

    Args:
        train: a training file.
        test: a test file.
        found: number of training and test images.
        official: the published numbers.

    Raises:
        DataError: one part is official, the other one is not, or a part is empty.

    Example:
        >>> check_sizes(Path("a"), Path("b"), (100, 20), (50000, 10000))
    """
    complete = [count == published for count, published in zip(found, official, strict=True)]
    for path, count, published, whole in zip((train, test), found, official, complete, strict=True):
        if count == 0 or (any(complete) and not whole):
            raise mismatch(path, f"{published} images in all", count)
