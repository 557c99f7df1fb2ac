"""Augmentation: the right images, with the right frequencies, each image on its own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from sparsekd.data.augment import CenterCrop, CropFlip, RandomResizedCrop

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
    for augment in (CropFlip(2), RandomResizedCrop(8)):
        torch.manual_seed(0)
        first = augment(images, generator(7))
        torch.manual_seed(1)
        assert torch.equal(first, augment(images, generator(7)))
        assert not torch.equal(first, augment(images, generator(8)))


def test_full_box_resizes_to_the_image_itself():
    images = torch.rand(64, 3, 8, 8)
    result = RandomResizedCrop(8, scale=(1, 1), ratio=(1, 1))(images, generator())
    either = torch.minimum(
        (result - images).abs().amax((1, 2, 3)), (result - images.flip(3)).abs().amax((1, 2, 3))
    )
    assert either.max() < 1e-5


def test_boxes_stay_inside_and_have_the_right_area():
    side, size = 64, 16
    ramp = torch.linspace(0, 1, side)
    across = ramp.expand(side, side)
    images = torch.stack([across, across.T]).expand(4000, 2, side, side)
    scale, ratio = (0.2, 0.6), (0.8, 1.25)
    result = RandomResizedCrop(size, scale, ratio)(images, generator())
    assert result.min() >= -1e-6
    assert result.max() <= 1 + 1e-6
    # The ramp's rise between the outermost sample centres measures each box's sides.
    width = (result[:, 0, 0, -1] - result[:, 0, 0, 0]).abs() * size / (size - 1)
    height = (result[:, 1, -1, 0] - result[:, 1, 0, 0]).abs() * size / (size - 1)
    area = width * height * ((side - 1) / side) ** 2
    tolerance = 0.02
    assert area.min() > scale[0] - tolerance
    assert area.max() < scale[1] + tolerance
    assert area.mean().item() == pytest.approx(sum(scale) / 2, abs=tolerance)
    assert (width / height).max() < ratio[1] + tolerance
    assert (width / height).min() > ratio[0] - tolerance


def test_center_crop():
    image = torch.arange(36).view(1, 1, 6, 6)
    assert CenterCrop(2)(image).flatten().tolist() == [14, 15, 20, 21]
