"""The weight-sparse fully connected layer."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from sparsekd import ops
from sparsekd.errors import UnsupportedError
from sparsekd.layouts import Layout
from sparsekd.nn.base import SparseModule, copy_dense_
from sparsekd.nn.masks import dense_mask, initial_mask
from sparsekd.tracing import call_module, stays_whole

_Linear = TypeVar("_Linear", bound="SparseLinear")


class SparseLinear(SparseModule):
    """Linear layer that stores and computes only the nonzeros of its weight.

    A drop-in replacement for nn.Linear. Mask, values and bias are drawn from a generator of their
    own, so equal arguments give equal modules and torch's global generator is left alone.

    Args:
        in_features: size of each input sample.
        out_features: size of each output sample.
        bias: whether to add a bias.
        sparsity: fraction of zeros; exactly `round((1 - sparsity) * N)` weights are stored, or
            the nearest number of whole tiles where the layout has tiles.
        seed: seed of mask, values and bias.
        mask: where the nonzeros are, instead of a random choice of `sparsity`.
        layout: structure of this and all later masks: "csr" (any mask), "bcsr", "fanin" or "nm",
            or a `sparsekd.Layout` with its numbers.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - Input: [*, in_features]
        - Output: [*, out_features]
        - values: [nnz], the weight's nonzeros in row-major order

    Raises:
        ValueError: if `sparsity` is outside [0, 1], or not the one that "nm" has.
        ShapeError: if `mask` is not of shape [out_features, in_features].
        TopologyError: if `mask` is not bool.
        UnsupportedError: if `layout` is not known, or `mask` does not fit it.

    Source: Evci et al., Gradient Flow in Sparse Neural Networks, section 3, for the initialisation.

    Example:
        >>> import torch, sparsekd as skd
        >>> layer = skd.nn.SparseLinear(512, 256, sparsity=0.9, seed=0)
        >>> layer(torch.randn(8, 512)).shape, layer.topology.nnz
        (torch.Size([8, 256]), 13107)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        sparsity: float = 0.9,
        seed: int = 0,
        *,
        mask: Tensor | None = None,
        layout: str | Layout = "csr",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        layout = Layout.parse(layout)
        shape = (out_features, in_features)
        mask, generator = initial_mask(shape, mask, sparsity, seed, layout)
        super().__init__(mask, bias=bias, layout=layout, device=device, dtype=dtype)
        self.in_features, self.out_features = in_features, out_features
        self.reset_parameters(generator)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias`."""
        if isinstance(x, Proxy) and stays_whole(self, SparseLinear.forward, x):
            return call_module(self, x)
        self._watch()
        return ops.call_linear(x, *self._operands(), self.weight_shape)

    @classmethod
    def from_dense(
        cls,
        dense: nn.Linear,
        mask: Tensor | None = None,
        *,
        sparsity: float | None = None,
        layout: str | Layout = "csr",
    ) -> SparseLinear:
        """Copy a dense layer, keeping the weights of `mask` or those of largest magnitude.

        Args:
            dense: the layer; it is left as it is.
            mask: which weights to keep; bool tensor of the weight's shape.
            sparsity: instead of `mask`: fraction of weights to remove, the smallest ones; of equal
                magnitudes the one at the lower index stays. Where the layout has tiles, those of
                the smallest mean magnitude go.
            layout: structure of the sparse module's masks.

        Returns:
            A sparse layer with the dense one's device, dtype and training mode.

        Raises:
            ValueError: unless exactly one of `mask` and `sparsity` is given.
            UnsupportedError: if `dense` is no nn.Linear with a floating-point weight, or `mask`
                does not fit `layout`.
            ShapeError, TopologyError: if `mask` does not fit the weight.

        Example:
            >>> import torch, sparsekd as skd
            >>> skd.nn.SparseLinear.from_dense(torch.nn.Linear(8, 4), sparsity=0.75).topology.nnz
            8
        """
        if not isinstance(dense, nn.Linear):
            raise UnsupportedError(f"dense: expected an nn.Linear, got {type(dense).__name__}")
        return cls._copy_of(dense, mask, sparsity, layout)

    @classmethod
    def _copy_of(
        cls: type[_Linear],
        dense: Any,
        mask: Tensor | None,
        sparsity: float | None,
        layout: str | Layout,
    ) -> _Linear:
        layout = Layout.parse(layout)
        mask = dense_mask(dense, mask, sparsity, layout)
        out_features, in_features = mask.shape
        sparse = cls(
            in_features,
            out_features,
            dense.bias is not None,
            mask=mask,
            layout=layout,
            device=dense.weight.device,
            dtype=dense.weight.dtype,
        )
        return copy_dense_(sparse, dense)

    def to_dense(self) -> nn.Linear:
        """Return an nn.Linear with the zeros stored.

        Example:
            >>> import sparsekd as skd
            >>> skd.nn.SparseLinear(8, 4, sparsity=0.5).to_dense()
            Linear(in_features=8, out_features=4, bias=True)
        """
        bias = self.bias is not None
        return self._fill_dense(nn.Linear(self.in_features, self.out_features, bias, device="meta"))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._describe_topology()}"
        )


# torch.fx writes the annotations of what it traces into a graph, and cannot pickle strings there.
SparseLinear.forward.__annotations__ = {"x": Tensor, "return": Tensor}
