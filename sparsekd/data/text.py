"""Text as windows of characters, each with the character that follows."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sparsekd.data.dataset import Dataset, build
from sparsekd.errors import DataError

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
"""The newline and the printable characters of ASCII; all others are read as spaces."""

_TEST = 0.1  # share of the text, its end, that is tested on


def load_text(
    root: Path | None,
    *,
    seed: int,
    val_fraction: float,
    context: int = 32,
    train_size: int = 10_000,
    test_size: int = 1_000,
) -> Dataset:
    """Cut a text into windows to predict the next character of.

    Args:
        root: folder whose .txt files are read, in the order of their names; None for the topics of
            the help that ships with Python, about 700,000 characters.
        seed: chooses the validation windows.
        val_fraction: share of the training windows held out.
        context: characters of a window.
        train_size: number of training windows, validation included.
        test_size: number of test windows, all from the last tenth of the text.

    Returns:
        The data set. Inputs ``[1, 1, context]`` are positions in `CHARACTERS`, labels those of the
        characters that follow; windows begin at random places.

    Raises:
        DataError: the folder has no text, or the text is too short.

    Example:
        >>> text = load_text(None, seed=0, val_fraction=0, train_size=50, test_size=10)
        >>> text.input_shape, text.num_classes
        ((1, 1, 32), 96)
    """
    codes = _encode(_read(root))
    cut = len(codes) - int(len(codes) * _TEST)
    if min(cut, len(codes) - cut) <= context:
        raise DataError(f"text: expected at least {10 * context + 10} characters, got {len(codes)}")
    generator = torch.Generator().manual_seed(0)  # the same windows for every seed
    train = _windows(codes[:cut], context, train_size, generator)
    test = _windows(codes[cut:], context, test_size, generator)
    return build(
        "text",
        len(CHARACTERS),
        train,
        test,
        _as_it_is,
        seed=seed,
        val_fraction=val_fraction,
        statistics=(torch.zeros(1), torch.ones(1)),
    )


def _as_it_is(windows: Tensor, generator: torch.Generator) -> Tensor:
    return windows


def _read(root: Path | None) -> str:
    if root is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    files = sorted(root.glob("*.txt"))
    if not files:
        raise DataError(f"root: expected .txt files; found none in {root}")
    try:
        return "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    except UnicodeDecodeError as error:
        raise DataError(f"root: expected text in UTF-8 in {root}: {error}") from error


def _encode(text: str) -> Tensor:
    space = CHARACTERS.index(" ")
    place = {character: number for number, character in enumerate(CHARACTERS)}
    return torch.tensor([place.get(character, space) for character in text], dtype=torch.uint8)


def _windows(
    codes: Tensor, context: int, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    begins = torch.randint(len(codes) - context, (count,), generator=generator)
    windows = codes[begins[:, None] + torch.arange(context)]
    return windows[:, None, None], codes[begins + context].long()
