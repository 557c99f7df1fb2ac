"""Augmentations of a whole batch, drawn from the generator they are given."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def _coins(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator) < 0.5


@dataclass(frozen=True)
class CropFlip:
    """A random crop of each zero-padded image; half of the images are flipped.

    Args:
        padding: largest shift in pixels along each axis.
        flip: mirror each image left to right with probability one half.

    Shape:
        ``[N, C, H, W]`` of any dtype to the same shape and dtype.

    Source: He et al., Deep Residual Learning (2016), section 4.2.

    Example:
        >>> crop = CropFlip(padding=4)
        >>> crop(torch.zeros(2, 3, 32, 32), torch.Generator()).shape
        torch.Size([2, 3, 32, 32])
    """

    padding: int
    flip: bool = True

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment a batch of raw images."""
        count, channels, height, width = images.shape
        if self.padding == 0 and not self.flip:
            return images
        top = torch.randint(2 * self.padding + 1, (count, 1), generator=generator)
        left = torch.randint(2 * self.padding + 1, (count, 1), generator=generator)
        rows = top + torch.arange(height)
        columns = left + torch.arange(width)
        if self.flip:
            mirrored = _coins(count, generator)[:, None]
            columns = torch.where(mirrored, columns.flip(1), columns)
        padded = F.pad(images, (self.padding,) * 4)
        return padded[
            torch.arange(count)[:, None, None, None],
            torch.arange(channels)[None, :, None, None],
            rows[:, None, :, None],
            columns[:, None, None, :],
        ]


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random box of each image, resized to a fixed size; half of the images are flipped.

    Args:
        size: height and width of the result.
        scale: range of the box's share of the image area.
        ratio: range of the box's width over its height, drawn log-uniformly.

    Shape:
        ``[N, C, H, W]`` of any dtype to ``[N, C, size, size]`` float32, values in the same range.

    Source: Szegedy et al., Going Deeper with Convolutions (2015), section 6.

    Example:
        >>> RandomResizedCrop(8)(torch.zeros(2, 3, 16, 16), torch.Generator()).shape
        torch.Size([2, 3, 8, 8])
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment a batch of raw images."""
        count = images.shape[0]
        area, log_ratio, across, down = torch.rand(4, count, generator=generator)
        area = self.scale[0] + (self.scale[1] - self.scale[0]) * area
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        ratio = torch.exp(low + (high - low) * log_ratio)
        # In grid_sample's coordinates the image spans [-1, 1], so a box of share w leaves 1 - w.
        width = (area * ratio).sqrt().clamp(max=1)
        height = (area / ratio).sqrt().clamp(max=1)
        sign = torch.where(_coins(count, generator), -1.0, 1.0)
        theta = torch.zeros(count, 2, 3)
        theta[:, 0, 0] = sign * width
        theta[:, 1, 1] = height
        theta[:, 0, 2] = (2 * across - 1) * (1 - width)
        theta[:, 1, 2] = (2 * down - 1) * (1 - height)
        grid = F.affine_grid(theta, [count, images.shape[1], self.size, self.size], False)
        return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)


@dataclass(frozen=True)
class CenterCrop:
    """The central square, which evaluation uses where training uses random boxes.

    Args:
        size: height and width of the result.

    Shape:
        ``[N, C, H, W]`` to ``[N, C, size, size]``.

    Example:
        >>> CenterCrop(2)(torch.arange(16).view(1, 1, 4, 4)).flatten().tolist()
        [5, 6, 9, 10]
    """

    size: int

    def __call__(self, images: Tensor) -> Tensor:
        """Crop a batch of raw images."""
        top = (images.shape[2] - self.size) // 2
        left = (images.shape[3] - self.size) // 2
        return images[:, :, top : top + self.size, left : left + self.size]
