"""Augmentations of a whole batch, drawn from the generator they are given."""

from __future__ import annotations

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
