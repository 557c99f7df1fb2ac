"""A layer in the tiles of its layout, as the rules that drop and grow see it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from sparsekd.dst import scores
from sparsekd.errors import UnsupportedError
from sparsekd.layouts import Layout, check_layouts
from sparsekd.nn import SparseModule
from sparsekd.ops.growth import Block
from sparsekd.sparsity import apportion
from sparsekd.topology import Topology


@dataclass(frozen=True)
class LayerUpdate:
    """The effect of one update on one layer, in weights.

    Args:
        dropped: weights that the drop rule took out.
        grown: positions that the grow rule put in.
        regrown: how many of `grown` were among the dropped, and so kept their value.
    """

    dropped: int
    grown: int
    regrown: int


class TileGrid:
    """A layer as a weight with one number per tile, and how tiles are dropped and grown.

    `tiles` is the structure of that weight: the layer's own where a tile is one weight. Rules that
    drop and grow work on it as they would on a topology, and `expand` gives the mask.

    In some layouts tiles compete in *cells* only: the groups of rows of "fanin", which all lose and
    gain the same number, and the runs of "nm", each of which gains what it loses.

    Args:
        topology: of the layer; fits the layout.
        layout: of the layer.

    Example:
        >>> mask = Layout("bcsr", block=2).tiling((4, 4)).expand(torch.eye(2, dtype=torch.bool))
        >>> grid = TileGrid(Topology.from_mask(mask), Layout("bcsr", block=2))
        >>> grid.tiles.nnz, grid.tiles.shape
        (2, torch.Size([2, 2]))
    """

    def __init__(self, topology: Topology, layout: Layout) -> None:
        self.topology, self.layout = topology, layout
        self.tiling = layout.tiling(topology.shape)
        self.single = layout.tile == (1, 1)
        """Whether every tile is one weight."""
        self.tiles = topology
        if not self.single:
            self._tile_of = self.tiling.tile_of(topology.flat_indices())
            stored = torch.zeros(self.tiling.numel, dtype=torch.bool, device=topology.device)
            stored[self._tile_of] = True
            self.tiles = Topology.from_mask(stored.view(self.tiling.grid))

    @property
    def in_cells(self) -> bool:
        """Whether tiles compete in cells only."""
        return self.layout.in_cells

    @property
    def quantum(self) -> int:
        """Smallest number of tiles that change together: in even cells one of each used cell."""
        if not self.layout.even:
            return 1
        return int(self._used().sum()) if self.tiles.nnz else max(self.tiles.rows, 1)

    @property
    def size(self) -> Fraction:
        """Weights of a tile, the mean of all tiles."""
        return Fraction(self.topology.numel, max(self.tiles.numel, 1))

    @property
    def grain(self) -> int:
        """Smallest change of the layer's number of weights, in whole tiles."""
        return math.prod(self.layout.tile) * self.quantum

    def areas(self, positions: Tensor) -> Tensor:
        """Return the weights of the tiles at these positions, int64."""
        if self.single:
            return torch.ones_like(positions)
        return self.tiling.areas(positions.device).view(-1)[positions]

    def pool(self, score: Tensor) -> Tensor:
        """Return the mean of a score over each stored tile, so that ragged ones are comparable.

        The sums are added up in one order, whatever the device.

        Shape:
            `[nnz of the layer] -> [nnz of tiles]`
        """
        if self.single or not len(score):
            return score
        lengths = torch.bincount(self._tile_of, minlength=self.tiling.numel)
        lengths = lengths[self.tiles.flat_indices()]
        in_tiles = score[self._tile_of.argsort(stable=True)]
        return torch.segment_reduce(in_tiles, "sum", lengths=lengths) / lengths

    def pool_magnitude(self, blocks: Iterable[Block], like: Tensor) -> Tensor:
        """Return the mean magnitude over every tile of numbers that come in rectangles.

        Args:
            blocks: rectangles that cover the weight's matrix once; each is read before the next is
                asked for. Nothing larger than one of them is stored besides the result.
            like: gives the device, and the dtype where there are no blocks.

        Shape:
            `[rows of tiles, columns of tiles]`
        """
        sums: Tensor | None = None
        for row, column, block in blocks:
            if sums is None:
                sums = block.new_zeros(self.tiling.grid)
            self.tiling.pool_into(sums, row, column, block.abs())
        if sums is None:
            sums = like.new_zeros(self.tiling.grid)
        mean = sums if self.single else sums / self.tiling.areas(sums.device)
        return mean.view(self.tiles.rows, self.tiles.cols)

    def lowest(self, score: Tensor, k: int) -> Tensor:
        """Return the slots of the `k` tiles of lowest score to drop together, ascending.

        Args:
            score: one number per stored tile.
            k: how many; for "fanin" a multiple of `quantum`.
        """
        if not self.layout.even or not k:
            return scores.smallest(score, k)
        group = self.cell_of(self.tiles.flat_indices())
        quota = self._used() * (k // self.quantum)
        return scores.largest_in_cells(-score, group, quota).nonzero().squeeze(1)

    def quota(self, dropped: Tensor, k: int) -> Tensor:
        """Share `k` new tiles between the cells.

        Args:
            dropped: slots of the tiles that go.
            k: how many come; for "fanin" a multiple of `quantum`, for "nm" as many as go.

        Returns:
            int64, one entry per cell.
        """
        if self.layout.even:
            used = self._used() if self.tiles.nnz else torch.ones_like(self._used())
            return used * (k // self.quantum)
        cells = self.cell_of(self.tiles.flat_indices()[dropped])
        rows, across, _, taps = self.layout.cells(self.tiles.shape)
        return torch.bincount(cells, minlength=rows * across * taps)

    def cell_of(self, positions: Tensor) -> Tensor:
        """Return the cell of each position of the flat grid."""
        return self.layout.cell_of(positions, self.tiles.shape)

    def exchange(self, dropped: Tensor, grown: Tensor) -> tuple[Tensor, LayerUpdate]:
        """Return the weight's mask after dropping some tiles and growing others.

        Args:
            dropped: slots of the tiles that go.
            grown: positions of the tiles that come; those among the dropped stay.

        Returns:
            The mask, and what was exchanged.
        """
        tiles = self.tiles
        positions = tiles.flat_indices()
        gone = positions[dropped]
        flat = torch.zeros(tiles.numel, dtype=torch.bool, device=tiles.device)
        flat[positions] = True
        flat[gone] = False
        flat[grown] = True
        moved = gone, grown, gone[flat[gone]]
        update = LayerUpdate(*(int(self.areas(part).sum()) for part in moved))
        return self.expand(flat.view(tiles.shape)), update

    def expand(self, tiles: Tensor) -> Tensor:
        """Return the weight's mask for a mask of tiles."""
        return tiles if self.single else self.tiling.expand(tiles)

    def coarsen(self, mask: Tensor) -> Tensor:
        """Return which tiles a mask of the weight touches."""
        return mask if self.single else self.tiling.pool(mask.to(torch.int32)) > 0

    def _used(self) -> Tensor:
        """Return 1 for every group of rows that has a tile, and 0 for the others."""
        return (self.tiles.crow_indices.diff() > 0).long()


class TileGrids:
    """The grids of a model's layers, made when asked for and again once a topology has changed.

    Args:
        modules: sparse modules by name.
    """

    def __init__(self, modules: Mapping[str, SparseModule]) -> None:
        self._modules = modules
        self._made: dict[str, TileGrid] = {}

    def __getitem__(self, name: str) -> TileGrid:
        module, made = self._modules[name], self._made.get(name)
        topology = module.topology
        if made is None or made.topology is not topology or made.layout != module.layout:
            made = self._made[name] = TileGrid(topology, module.layout)
        return made

    def clear(self) -> None:
        """Forget all grids, which hold tensors of the size of the layers."""
        self._made.clear()


def smallest_overall(
    grids: Mapping[str, TileGrid], score: Mapping[str, Tensor], weights: int
) -> dict[str, int]:
    """Count, for each layer, its share of the tiles of lowest score of all layers.

    Args:
        grids: by layer.
        score: one number per stored tile, by layer.
        weights: how many go over all layers, as near as whole tiles come to it.

    Returns:
        Number of tiles by layer, each a multiple of its grid's `quantum`.
    """
    if all(grid.single and grid.quantum == 1 for grid in grids.values()):
        return scores.smallest_overall(score, weights)
    areas = {name: grid.areas(grid.tiles.flat_indices()) for name, grid in grids.items()}
    gone = scores.smallest_overall(score, weights, areas)
    if all(grid.quantum == 1 for grid in grids.values()):
        return gone
    share = {name: float(gone[name] * grid.size) for name, grid in grids.items()}
    stored = {name: grid.tiles.nnz for name, grid in grids.items()}
    return in_tiles(grids, share, stored, weights)


def in_tiles(
    grids: Mapping[str, TileGrid], weights: Mapping[str, float], room: Mapping[str, int], total: int
) -> dict[str, int]:
    """Round real numbers of weights to numbers of tiles whose sum is close to a total.

    Args:
        grids: by layer.
        weights: by layer.
        room: tiles that each layer can have at most.
        total: weights over all layers.

    Returns:
        Number of tiles by layer, each a multiple of its grid's `quantum`.
    """
    size = {name: grid.size * grid.quantum for name, grid in grids.items()}
    units = {name: room[name] // grid.quantum for name, grid in grids.items()}
    quota = {name: weights[name] / size[name] if size[name] else 0.0 for name in grids}
    most = math.floor(sum(units[name] * size[name] for name in grids))
    count = apportion(quota, units, min(total, most), size)
    return {name: count[name] * grid.quantum for name, grid in grids.items()}


def slack(grids: Mapping[str, TileGrid]) -> int:
    """Return how far whole tiles may miss a target, in weights."""
    return max((grid.grain for grid in grids.values()), default=1) // 2


def check_method(kind: type, layers: Mapping[str, Layout]) -> None:
    """Check that a method can keep the layout of every layer.

    Args:
        kind: the method, a subclass of `Updater`. One that replaces `grow` of a method, and not its
            `ranking`, has no rule for layouts with cells.
        layers: layouts by layer.
    """
    check_layouts(layers.items(), kind.layouts, kind.__name__)  # type: ignore[attr-defined]
    grows, ranks = (next(c for c in kind.__mro__ if m in vars(c)) for m in ("grow", "ranking"))
    celled = [name for name, layout in layers.items() if layout.in_cells]
    if celled and grows is not ranks and issubclass(grows, ranks):
        raise UnsupportedError(
            f"{kind.__name__} replaces grow but not ranking, which layout "
            f"{str(layers[celled[0]])!r} of layer {celled[0]!r} asks for"
        )
