"""The cost of a network: a row per weight, products of activations, totals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LayerFlops:
    """The operations of one weight in a forward pass.

    Args:
        name: of the layer in the model; of the parameter where a module has several or calls it
            otherwise ("lstm.weight_hh_l0", "attention.in_proj_weight"), with the rows in brackets
            where an operation uses a part of it; "layer.weight" where a sparse layer's dense weight
            is read and computed with from outside.
        shape: of the weight.
        nnz: weights it computes with; all of them if the weight is dense.
        positions: how often each is used, summed over all calls: for a convolution or a linear
            layer, outputs per output channel.
    """

    name: str
    shape: tuple[int, ...]
    nnz: int
    positions: int

    @property
    def density(self) -> float:
        """Share of the weight that is stored."""
        return self.nnz / max(math.prod(self.shape), 1)

    @property
    def flops(self) -> int:
        """Operations of a forward pass, a multiplication and an addition per weight in use."""
        return 2 * self.nnz * self.positions

    @property
    def flops_dense(self) -> int:
        """Operations of the same layer with a dense weight."""
        return 2 * math.prod(self.shape) * self.positions


@dataclass(frozen=True)
class ProductFlops:
    """The operations of products of activations in one module, such as queries with keys.

    Args:
        name: of the module that computes them, not of one that it is part of.
        flops: operations of a forward pass.
    """

    name: str
    flops: int


@dataclass(frozen=True)
class FlopCount:
    """The operations of a network; print it for a table of its layers.

    Args:
        layers: the weights in the order of their first use.
        products: the modules that multiply activations with each other, likewise; their operations
            are the same whatever the sparsity.
    """

    layers: tuple[LayerFlops, ...]
    products: tuple[ProductFlops, ...] = ()

    @property
    def nnz(self) -> int:
        """Weights of all counted layers."""
        return sum(layer.nnz for layer in self.layers)

    @property
    def forward(self) -> int:
        """Operations of a forward pass."""
        return sum(layer.flops for layer in self.layers) + self._products

    @property
    def forward_dense(self) -> int:
        """Operations of a forward pass of the same network with dense weights."""
        return sum(layer.flops_dense for layer in self.layers) + self._products

    @property
    def _products(self) -> int:
        return sum(product.flops for product in self.products)

    @property
    def train(self) -> int:
        """Operations of forward and backward, by the convention that backward costs twice."""
        return 3 * self.forward

    @property
    def train_dense(self) -> int:
        """Operations of forward and backward of the same network with dense weights."""
        return 3 * self.forward_dense

    def at(self, nnz: Mapping[str, int]) -> FlopCount:
        """Count the same network with other numbers of nonzeros.

        Args:
            nnz: number by layer name; layers without one stay as they are.

        Raises:
            ValueError: a name is no counted layer, or a number does not fit its weight.

        Example:
            >>> from torch import nn
            >>> from sparsekd.diagnose import flops
            >>> dense = flops.count(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), (1, 8))
            >>> dense.forward, dense.at({"0": 10}).forward
            (80, 36)
        """
        sizes = {layer.name: math.prod(layer.shape) for layer in self.layers}
        for name, number in nnz.items():
            if name not in sizes or not 0 <= number <= sizes[name]:
                raise ValueError(
                    f"nnz: expected 0 to {sizes[name]} for {name!r}, got {number}"
                    if name in sizes
                    else f"nnz: expected names among {', '.join(sizes)}, got {name!r}"
                )
        layers = (replace(layer, nnz=nnz.get(layer.name, layer.nnz)) for layer in self.layers)
        return replace(self, layers=tuple(layers))

    def __str__(self) -> str:
        header = ("layer", "weight", "nnz", "density", "positions", "FLOPs")
        rows = [
            (
                layer.name,
                "x".join(map(str, layer.shape)),
                f"{layer.nnz:,}",
                f"{layer.density:.4f}",
                f"{layer.positions:,}",
                f"{layer.flops:,}",
            )
            for layer in self.layers
        ]
        rows += [(p.name, "-", "", "", "", f"{p.flops:,}") for p in self.products]
        share = self.forward / self.forward_dense if self.forward_dense else 1.0
        total = ("total", "", f"{self.nnz:,}", f"{share:.4f} of dense", "", f"{self.forward:,}")
        table = [header, *rows, total]
        widths = [max(len(row[column]) for row in table) for column in range(len(header))]
        return "\n".join(
            "  ".join(
                text.ljust(width) if column < 2 else text.rjust(width)
                for column, (text, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        )
