"""Layouts: structure that a mask keeps, so that kernels find it in the indices.

Storage never changes: a layer holds its nonzeros in row-major order whatever its layout, so
checkpoints, optimizers and conversions know nothing of layouts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekd.errors import TopologyError, UnsupportedError

_DEFAULTS: dict[str, dict[str, int]] = {
    "csr": {},
    "bcsr": {"block": 16},
    "fanin": {"group": 1, "block": 1},
    "nm": {"n": 2, "m": 4},
}
_SEPARATOR = {"fanin": "x", "nm": ":"}

LAYOUTS = tuple(_DEFAULTS)


@dataclass(frozen=True)
class Layout:
    """The structure that a layer's mask keeps.

    A tile is `tile[0]` consecutive output channels times `tile[1]` consecutive input channels of a
    group at one kernel tap; the last tile along either axis may be smaller.

    - "csr": any mask.
    - "bcsr": every tile of `block` x `block` is all nonzero or all zero.
    - "fanin": every tile of `group` x `block` is all nonzero or all zero, and all groups of rows
      have the same number of tiles, except those that have none.
    - "nm": of every `m` consecutive input channels, in a row and at a tap, `n` are nonzero; in a
      shorter run at the end `n` again, or all of them if there are fewer.

    Args:
        name: "csr", "bcsr", "fanin" or "nm".
        block: size of the tiles of "bcsr" (default 16), input channels of those of "fanin" (1).
        group: output channels of the tiles of "fanin" (1).
        n: nonzeros of a run of "nm" (2).
        m: length of a run of "nm" (4).

    Raises:
        UnsupportedError: `name` is not known.
        ValueError: a number is out of range, or this layout does not take it.

    Source: Lasby et al., Dynamic Sparse Training with Structured Sparsity (arXiv 2305.02299), for
        "fanin"; Mishra et al., Accelerating Sparse Deep Neural Networks (arXiv 2104.08378), for
        "nm".

    Example:
        >>> layout = Layout("bcsr", block=32)
        >>> str(layout), layout.tile, Layout.parse("bcsr:32") == layout
        ('bcsr:32', (32, 32), True)
    """

    name: str = "csr"
    block: int | None = None
    group: int | None = None
    n: int | None = None
    m: int | None = None

    def __post_init__(self) -> None:
        if self.name not in _DEFAULTS:
            raise UnsupportedError(
                f"layout: expected one of {', '.join(LAYOUTS)}, got {self.name!r}"
            )
        own = _DEFAULTS[self.name]
        for field in ("block", "group", "n", "m"):
            value = getattr(self, field)
            if value is None:
                object.__setattr__(self, field, own.get(field))
            elif field not in own:
                takes = f"it takes {' and '.join(own)}" if own else "it takes no numbers"
                raise ValueError(f"{field}: not a number of layout {self.name!r}; {takes}")
            elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field}: expected a positive integer, got {value!r}")
        if self.n is not None and self.m is not None and self.n > self.m:
            raise ValueError(f"n: expected at most m={self.m}, got {self.n}")

    @classmethod
    def parse(cls, text: str | Layout) -> Layout:
        """Parse a layout; one that is a `Layout` already is returned unchanged.

        Args:
            text: a name, or one with numbers: "bcsr:32" (block), "fanin:32" (group),
                "fanin:32x16" (group x block), "nm:1:4" (n:m).

        Raises:
            UnsupportedError: the name is not known, or `text` is not a string.
            ValueError: the numbers are not whole, too many, or out of range.

        Example:
            >>> Layout.parse("fanin:32x16")
            Layout(name='fanin', block=16, group=32, n=None, m=None)
        """
        if isinstance(text, Layout):
            return text
        if not isinstance(text, str):
            raise UnsupportedError(f"layout: expected a name or a Layout, got {text!r}")
        name, colon, tail = text.partition(":")
        fields = _DEFAULTS.get(name, {})
        numbers = tail.split(_SEPARATOR.get(name, ":")) if colon else []
        if len(numbers) > len(fields) and name in _DEFAULTS:
            raise ValueError(f"layout: expected at most {len(fields)} numbers, got {text!r}")
        if not all(number.isdecimal() for number in numbers):
            raise ValueError(f"layout: expected whole numbers after the name, got {text!r}")
        return cls(name, **dict(zip(fields, map(int, numbers), strict=False)))

    def __str__(self) -> str:
        order = [str(getattr(self, field)) for field in _DEFAULTS[self.name]]
        return ":".join(
            [self.name, _SEPARATOR.get(self.name, ":").join(order)] if order else ["csr"]
        )

    @property
    def tile(self) -> tuple[int, int]:
        """Output and input channels of a tile; a single weight for "csr" and "nm"."""
        if self.name == "bcsr":
            assert self.block is not None
            return self.block, self.block
        return self.group or 1, self.block or 1

    @property
    def unstructured(self) -> bool:
        """Whether every mask fits."""
        return self.name == "csr"

    @property
    def fixed_density(self) -> float | None:
        """Density that the layout prescribes for every layer; None if it allows any."""
        return None if self.n is None or self.m is None else self.n / self.m

    @property
    def in_cells(self) -> bool:
        """Whether tiles compete within cells only: groups of rows ("fanin") or runs ("nm")."""
        return self.name in ("fanin", "nm")

    @property
    def even(self) -> bool:
        """Whether cells are groups of rows, and all that have any tiles have equally many."""
        return self.name == "fanin"

    def cells(self, grid: Sequence[int]) -> tuple[int, int, int, int]:
        """View a grid of tiles as `[rows, cells of a row, tiles of a cell, taps]`.

        Runs are whole in this view: channels are to be padded to a multiple of `m`.
        """
        rows, channels, *kernel = grid
        if self.m is not None:
            return rows, -(-channels // self.m), self.m, math.prod(kernel)
        return rows, 1, channels * math.prod(kernel), 1

    def cell_of(self, positions: Tensor, grid: Sequence[int]) -> Tensor:
        """Map flat positions in a grid of tiles to the numbers of their cells."""
        if self.m is not None:
            return self.runs(grid).tile_of(positions)
        return positions // max(math.prod(grid[1:]), 1)

    def tiling(self, shape: Sequence[int]) -> Tiling:
        """Cut a weight of this shape into tiles no larger than the weight."""
        rows, channels = (min(n, max(whole, 1)) for n, whole in zip(self.tile, shape, strict=False))
        return Tiling(torch.Size(shape), rows, channels)

    def runs(self, shape: Sequence[int]) -> Tiling:
        """Cut a weight into the runs of "nm"."""
        assert self.m is not None
        return Tiling(torch.Size(shape), 1, self.m)

    def fits(self, mask: Tensor) -> bool:
        """Return whether a mask has this structure.

        Args:
            mask: bool tensor of the weight's shape.

        Raises:
            TopologyError: `mask` is not bool, or its shape cannot be a weight's.

        Example:
            >>> Layout("nm").fits(torch.tensor([[True, False, False, True, True]]))
            True
        """
        return self.problem(mask) is None

    def check(self, mask: Tensor, name: str = "mask") -> None:
        """Check that a mask has this structure.

        Args:
            mask: bool tensor of the weight's shape.
            name: of the mask, for the message.

        Raises:
            UnsupportedError: it does not; the message says where, and what the layout requires.
            TopologyError: `mask` is not bool, or its shape cannot be a weight's.

        Example:
            >>> Layout("bcsr").check(torch.ones(20, 20, dtype=torch.bool))
        """
        problem = self.problem(mask)
        if problem is not None:
            raise UnsupportedError(f"{name}: {problem}; layout 'csr' takes any mask")

    def problem(self, mask: Tensor) -> str | None:
        """Describe the first place where a mask breaks this structure; None if it nowhere does."""
        if mask.dtype != torch.bool or mask.ndim < 2:
            raise TopologyError(
                f"mask: expected a torch.bool tensor of two or more dimensions, got {mask.dtype} "
                f"of shape {list(mask.shape)}"
            )
        if self.name == "csr":
            return None
        if self.name == "nm":
            return self._uneven_run(mask)
        if self.tile == (1, 1):
            return self._uneven_groups(mask) if self.name == "fanin" else None
        tiling = self.tiling(mask.shape)
        counts, areas = tiling.pool(mask.to(torch.int32)), tiling.areas(mask.device)
        torn = ((counts > 0) & (counts < areas)).view(-1).nonzero()
        if len(torn):
            at = int(torn[0])
            return (
                f"layout {str(self)!r} keeps whole tiles of {self.tile[0]} output x {self.tile[1]} "
                f"input channels, but that of {tiling.place(at)} has {int(counts.view(-1)[at])} of "
                f"its {int(areas.view(-1)[at])} weights"
            )
        return self._uneven_groups(counts > 0) if self.name == "fanin" else None

    def _uneven_groups(self, tiles: Tensor) -> str | None:
        fans = tiles.flatten(1).sum(1)
        used = fans[fans > 0]
        wrong = ((fans > 0) & (fans != used[:1])).nonzero() if len(used) else used
        if not len(wrong):
            return None
        group, rows = int(wrong[0]), self.tile[0]
        return (
            f"layout {str(self)!r} gives all groups of {rows} rows that are not empty the same "
            f"number of tiles, but group {group} has {int(fans[group])} and an earlier one "
            f"{int(used[0])}"
        )

    def _uneven_run(self, mask: Tensor) -> str | None:
        runs = self.runs(mask.shape)
        counts = runs.pool(mask.to(torch.int32))
        wanted = runs.areas(mask.device).clamp(max=self.n)
        wrong = (counts != wanted).view(-1).nonzero()
        if not len(wrong):
            return None
        at = int(wrong[0])
        return (
            f"layout {str(self)!r} keeps {int(wanted.view(-1)[at])} weights of {runs.place(at)}, "
            f"but there are {int(counts.view(-1)[at])}"
        )


@dataclass(frozen=True)
class Tiling:
    """A weight cut into tiles of `rows` output and `channels` input channels at one kernel tap.

    Numbers per tile (sums, scores, masks) form a tensor of the shape `grid`, a smaller weight
    `[row tiles, channel tiles, *kernel]`. Ragged tiles at the ends count like the others.

    Args:
        shape: of the weight, output channels first.
        rows: output channels of a tile.
        channels: input channels of a tile.

    Example:
        >>> tiling = Tiling(torch.Size([20, 3, 3, 3]), 16, 16)
        >>> tiling.grid, tiling.areas().unique().tolist()
        (torch.Size([2, 1, 3, 3]), [12, 48])
    """

    shape: torch.Size
    rows: int
    channels: int

    @property
    def grid(self) -> torch.Size:
        """Shape of a tensor with one entry per tile."""
        out, inner, *kernel = self.shape
        return torch.Size([-(-out // self.rows), -(-inner // self.channels), *kernel])

    @property
    def numel(self) -> int:
        """Number of tiles."""
        return math.prod(self.grid)

    @property
    def taps(self) -> int:
        """Number of kernel taps."""
        return math.prod(self.shape[2:])

    def areas(self, device: torch.device | str | None = None) -> Tensor:
        """Count the weights of each tile: int64 of the shape `grid`."""
        high = _parts(self.shape[0], self.rows, device)
        wide = _parts(self.shape[1], self.channels, device)
        area = (high[:, None] * wide).view(*self.grid[:2], *[1] * (len(self.shape) - 2))
        return area.expand(self.grid).contiguous()

    def pool(self, dense: Tensor) -> Tensor:
        """Sum a weight over each tile, without autograd.

        Shape:
            `[rows, channels, *kernel]`, or its matrix `[rows, columns]`, -> `grid`
        """
        sums = dense.new_zeros(self.grid, dtype=_sum_dtype(dense.dtype))
        self.pool_into(sums, 0, 0, dense.detach().reshape(self.shape[0], math.prod(self.shape[1:])))
        return sums

    def pool_into(self, sums: Tensor, row: int, column: int, block: Tensor) -> None:
        """Add a rectangle of the weight's matrix to the sums over the tiles it touches.

        Args:
            sums: of the shape `grid`; changed.
            row: first row of the rectangle.
            column: its first column, which is the first tap of a channel.
            block: its entries, whole channels.
        """
        taps, channel = max(self.taps, 1), column // max(self.taps, 1)
        above, left = row % self.rows, channel % self.channels
        high, wide = block.shape[0], block.shape[1] // taps
        below, right = -(above + high) % self.rows, -(left + wide) % self.channels
        if block.numel() == 0:
            return
        padded = F.pad(block.view(high, wide, taps), (0, 0, left, right, above, below))
        cut = padded.view(-(-(above + high) // self.rows), self.rows, -1, self.channels, taps)
        part = cut.sum((1, 3))
        whole = sums.view(*self.grid[:2], taps)
        first, start = row // self.rows, channel // self.channels
        whole[first : first + part.shape[0], start : start + part.shape[1]] += part

    def expand(self, tiles: Tensor) -> Tensor:
        """Copy the number of each tile to all weights of the tile.

        Shape:
            `grid` -> the weight's
        """
        out, inner = self.shape[:2]
        wide = tiles.repeat_interleave(self.channels, 1)[:, :inner]
        return wide.repeat_interleave(self.rows, 0)[:out].contiguous()

    def tile_of(self, positions: Tensor) -> Tensor:
        """Map positions of the flat weight to flat positions in `grid`, int64."""
        taps = max(self.taps, 1)
        row = positions // max(math.prod(self.shape[1:]), 1)
        channel = positions // taps % max(self.shape[1], 1)
        across = self.grid[1]
        tile = (row // self.rows * across + channel // self.channels) * taps
        return tile + positions % taps

    def place(self, tile: int) -> str:
        """Describe where a tile lies, by rows, channels and tap."""
        row, channel, *tap = (int(i) for i in torch.unravel_index(torch.tensor(tile), self.grid))
        spans = (
            _span("row", row * self.rows, self.rows, self.shape[0]),
            _span("channel", channel * self.channels, self.channels, self.shape[1]),
        )
        where = f", tap {tuple(tap)}" if tap else ""
        return ", ".join(spans) + where


def check_layouts(layers: Iterable[tuple[str, Layout]], known: Sequence[str], who: str) -> None:
    """Check that every layer has one of the supported layouts.

    Args:
        layers: names and layouts.
        known: names of the supported layouts.
        who: what supports only these, for the message.

    Raises:
        UnsupportedError: a layer has another layout; the message names the layer.
    """
    for name, layout in layers:
        if layout.name not in known:
            raise UnsupportedError(
                f"{who} does not support layout {str(layout)!r}, which layer {name!r} has; "
                f"it supports {', '.join(known)}"
            )


def _parts(size: int, step: int, device: torch.device | str | None) -> Tensor:
    starts = torch.arange(0, size, step, device=device)
    return (size - starts).clamp(max=step)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.is_floating_point else torch.int64


def _span(word: str, first: int, size: int, end: int) -> str:
    last = min(first + size, end) - 1
    return f"{word} {first}" if first == last else f"{word}s {first} to {last}"
