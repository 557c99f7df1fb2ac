"""Augmentation: the right images, with the right frequencies, each image on its own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from sparsekd.data.augment import CropFlip

TRIALS = 20_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_each_result_is_a_shift_or_a_mirrored_shift(flip, padding, dtype):
    images = torch.randint(1, 255, (32, 3, 6, 5), generator=generator(1)).to(dtype)
    result = CropFlip(padding, flip)(images, generator())
    assert result.shape == images.shape
    assert result.dtype == dtype
    padded = F.pad(images, (padding,) * 4)
    for image, big in zip(result, padded, strict=True):
        windows = [
            big[:, top : top + 6, left : left + 5]
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
        ]
        if flip:
            windows += [window.flip(2) for window in windows]
        assert any(torch.equal(image, window) for window in windows)


def test_no_augmentation_is_the_identity():
    images = torch.rand(4, 1, 5, 5)
    assert torch.equal(CropFlip(0, flip=False)(images, generator()), images)


def test_shifts_are_uniform_and_independent():
    padding, side = 2, 5
    image = torch.zeros(TRIALS, 1, side, side)
    image[:, :, 2, 2] = 1
    result = CropFlip(padding, flip=False)(image, generator())
    counts = result.sum((0, 1)) / TRIALS
    # The lit pixel lands on each of the 25 places equally often, within five standard errors.
    share = 1 / 25
    assert (counts - share).abs().max() < 5 * (share * (1 - share) / TRIALS) ** 0.5
    assert counts.sum() == pytest.approx(1)


def test_half_of_the_images_are_flipped():
    image = torch.zeros(TRIALS, 1, 2, 2)
    image[..., 0] = 1
    flipped = CropFlip(0)(image, generator())[:, 0, 0, 1].mean().item()
    assert flipped == pytest.approx(0.5, abs=5 * 0.5 / TRIALS**0.5)


def test_draws_come_from_the_generator_alone():
    images = torch.rand(16, 1, 8, 8)
    augment = CropFlip(2)
    torch.manual_seed(0)
    first = augment(images, generator(7))
    torch.manual_seed(1)
    assert torch.equal(first, augment(images, generator(7)))
    assert not torch.equal(first, augment(images, generator(8)))
