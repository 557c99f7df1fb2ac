"""The tiles in which the dense gradient of a weight is computed for growth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

_LARGEST = 1 << 19  # weights in a tile: 2 MiB in float32
_SMALL = 1 << 15  # not worth cutting further than in two


class Tile(NamedTuple):
    """A range of output channels and, within their group, of input channels; all kernel taps."""

    row: int
    rows: int
    channel: int
    channels: int


def tiles(weight_shape: Sequence[int], stride: Sequence[int] = (), groups: int = 1) -> list[Tile]:
    """Cut a weight into tiles, each at most a quarter of it, or half of it if it is small.

    Each tile reads one operand of the gradient whole and its share of the other; so the larger
    operand is the one to cut. Nothing but the layer decides, so all ranks of a distributed run cut
    alike.

    Args:
        weight_shape: shape of the weight, output channels first.
        stride: of a convolution, whose input is larger by that than its output.
        groups: number of groups of channels; these are not cut inside if that can be avoided.

    Example:
        >>> tiles([64, 128])[1]
        Tile(row=0, rows=64, channel=64, channels=64)
    """
    rows, channels, *kernel = weight_shape
    taps, numel = math.prod(kernel), math.prod(weight_shape)
    if numel == 0:
        return []
    most = min(max(numel // 4, min(numel // 2, _SMALL)), _LARGEST)
    if groups == 1 and channels * math.prod(stride) >= rows:
        step = _round_down(most // (rows * taps), 8)
        return [Tile(0, rows, c, min(step, channels - c)) for c in range(0, channels, step)]
    step = _round_down(most // (channels * taps), rows // groups if groups > 1 else 32)
    return [Tile(r, min(step, rows - r), 0, channels) for r in range(0, rows, step)]


def _round_down(count: int, block: int) -> int:
    """Return a multiple of `block`, as kernels like it; the number itself if it is too small."""
    return count - count % block if count > block else max(count, 1)
