"""The structure of a weight, read off its indices, and how to cut it into tiles.

A tile is R neighbouring outputs by C neighbouring input channels at one kernel tap that are all
nonzero. R divides every row at which the list of columns changes, C every channel at which a run of
neighbours begins or ends; so both are greatest common divisors. Nothing says in advance what they
are, and a mask that happens to have tiles is treated like one that was made with them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekd.ops.gpu.convolution import Conv
from sparsekd.ops.gpu.structure import Structure

SMALLEST = 16  # side of the smallest product on tensor cores


class Runs(NamedTuple):
    """The number of rows that share columns, and of channels that are neighbours in each row."""

    rows: int
    channels: int


def find_runs(structure: Structure, conv: Conv) -> Runs:
    """Return the largest R and C such that the weight consists of tiles R x C.

    The last tile of the rows, and of the channels of a group, may be smaller. A structure that has
    changed keeps those it had while it consists of them, so that plans keep their sizes: larger
    ones may be chance, and gone after the next change.
    """
    key = ("structure", conv)

    def make(structure: Structure) -> Runs:
        found, held = _find_runs(structure, conv), structure.earlier(key)
        wholes = conv.weight_shape[0] // conv.groups, conv.weight_shape[1]
        return found if held is None else Runs(*map(_kept, held, found, wholes))

    return structure.plan(key, make)


def _kept(held: int, found: int, whole: int) -> int:
    """Return a run of old where it still is one: a run of all can be cut anywhere."""
    return held if found >= whole or found % held == 0 else found


def _find_runs(structure: Structure, conv: Conv) -> Runs:
    rows, channels, *kernel = conv.weight_shape
    starts = row_starts(structure.crow, structure.col)
    bounds = torch.arange(0, rows, max(rows // conv.groups, 1))
    height = common_divisor(starts, bounds, whole=rows)
    kept = torch.zeros(rows, dtype=torch.bool)
    kept[starts] = True
    taps = math.prod(kernel)
    here = kept[structure.row]
    col = structure.col[here].long()
    key, _ = ((structure.row[here] * taps + col % taps) * channels + col // taps).sort()
    new = torch.ones(len(key) + 1, dtype=torch.bool)
    new[1:-1] = (key.diff() != 1) | (key[1:] % channels == 0)
    ends = (key[new[1:]] + 1) % channels
    return Runs(height, common_divisor(key[new[:-1]] % channels, ends, whole=channels))


def row_starts(crow: Tensor, ids: Tensor) -> Tensor:
    """Return the rows whose list of ids differs from that of the row above, the first included."""
    lengths = crow.diff().long()
    row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    alike = torch.zeros(len(lengths), dtype=torch.bool)
    alike[1:] = lengths[1:] == lengths[:-1]
    mine = alike[row].nonzero().squeeze(1)
    other = ids[mine] != ids[mine - lengths[row[mine]]]
    alike[row[mine[other]]] = False
    return (~alike).nonzero().squeeze(1)


def common_divisor(*starts: Tensor, whole: int) -> int:
    """Return the largest number that divides all starts; `whole` if there is none but 0."""
    every = torch.cat([s.long() for s in starts]).unique().tolist()
    return math.gcd(*every) or whole


def side(run: int, whole: int, most: int) -> int:
    """Return how many neighbours to compute together: a divisor of their run, at most `most`.

    Kernels compute powers of two; of the divisors that fill one well the largest is taken.

    Args:
        run: how many neighbours are alike.
        whole: how many there are; a run of all of them can be cut anywhere.
        most: the largest power of two that the kernel takes.
    """
    if run >= whole:
        sizes = [size for size in (16, 32, 64, 128) if size <= most]
        return min(sizes, key=lambda size: (-(-whole // size) * size, -size))
    divisors = [d for d in range(1, min(run, most) + 1) if run % d == 0]
    return max(divisors, key=lambda d: (min(d / power_of_two(d), 0.75), d))


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`, and at least SMALLEST."""
    return max(SMALLEST, 1 << (number - 1).bit_length())


class Axis(NamedTuple):
    """The channels of one side of a weight, cut `size` at a time within each group."""

    groups: int
    channels: int  # of a group
    size: int

    @property
    def parts(self) -> int:
        return -(-self.channels // self.size)

    def part(self, channel: Tensor) -> Tensor:
        """Return the part, of all groups, that a channel lies in."""
        group, within = self.split(channel)
        return group * self.parts + within // self.size

    def split(self, channel: Tensor) -> tuple[Tensor, Tensor]:
        return channel // self.channels, channel % self.channels

    def within(self, channel: Tensor) -> Tensor:
        """Return where in its part a channel lies."""
        return self.split(channel)[1] % self.size

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """How many channels the parts of a group have, and how many parts have so many."""
        full, rest = divmod(self.channels, self.size)
        return [(self.size, full), *([(rest, 1)] if rest else [])]

    def first_and_count(self, part: Tensor) -> Tensor:
        """Return the first channel of each part and how many it has, int64 [parts, 2]."""
        within = part % self.parts * self.size
        first = part // self.parts * self.channels + within
        return torch.stack([first, (self.channels - within).clamp(max=self.size)], 1)

    @property
    def even(self) -> bool:
        return self.channels % self.size == 0 and self.size == power_of_two(self.size)

    @property
    def align(self) -> int:
        return math.gcd(16, self.size, self.channels if self.groups > 1 else 0)
