"""The weight-sparse counterpart of the linear layer of GPT-2, as transformers has it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekd.errors import UnsupportedError
from sparsekd.layouts import Layout
from sparsekd.nn.linear import SparseLinear
from sparsekd.sparsity import conv1d_class


class SparseConv1D(SparseLinear):
    """Linear layer whose dense counterpart, `Conv1D` of transformers, stores [in, out].

    It is a SparseLinear: `topology`, `values`, `rewire` and `dense_weight()` have the outputs
    first. Only what stands for the dense layer has its order: `weight` and `dense_shape`,
    `from_dense` and its mask, `to_dense`, and a dense `state_dict` that is loaded.

    Args:
        in_features: size of each input sample, `nx` of a Conv1D.
        out_features: size of each output sample, `nf` of a Conv1D.
        bias: whether to add a bias; a Conv1D always has one.
        sparsity: fraction of zeros, as of SparseLinear.
        seed: seed of mask, values and bias.
        mask: where the nonzeros are, [out_features, in_features]; instead of `sparsity`.
        layout: structure of this and all later masks.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - Input: [*, in_features]
        - Output: [*, out_features]
        - weight: [in_features, out_features]

    Raises:
        ValueError, ShapeError, TopologyError, UnsupportedError: as SparseLinear.

    Source: Radford et al., Improving Language Understanding by Generative Pre-Training (2018).

    Example:
        >>> import torch, sparsekd as skd
        >>> layer = skd.nn.SparseConv1D(512, 256, sparsity=0.9)
        >>> layer(torch.randn(8, 512)).shape, layer.weight.shape, tuple(layer.topology.shape)
        (torch.Size([8, 256]), torch.Size([512, 256]), (256, 512))
    """

    @property
    def nx(self) -> int:
        """Number of inputs, under the name that Conv1D gives it."""
        return self.in_features

    @property
    def nf(self) -> int:
        """Number of outputs, under the name that Conv1D gives it."""
        return self.out_features

    @staticmethod
    def _turned(weight: Tensor) -> Tensor:
        return weight.t().contiguous()

    @staticmethod
    def _turned_shape(shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(reversed(shape))

    @classmethod
    def from_dense(
        cls,
        dense: Any,
        mask: Tensor | None = None,
        *,
        sparsity: float | None = None,
        layout: str | Layout = "csr",
    ) -> SparseConv1D:
        """Copy a Conv1D, keeping the weights of `mask` or those of largest magnitude.

        Args:
            dense: the layer; it is left as it is.
            mask: which weights to keep; bool tensor [in, out], as the weight.
            sparsity: instead of `mask`, as in `SparseLinear.from_dense`.
            layout: structure of the sparse module's masks, whose rows are the outputs.

        Returns:
            A sparse layer with the dense one's device, dtype and training mode.

        Raises:
            ValueError: unless exactly one of `mask` and `sparsity` is given.
            UnsupportedError: if `dense` is no Conv1D of transformers with a floating-point weight,
                or `mask` does not fit `layout`.
            ShapeError, TopologyError: if `mask` does not fit the weight.
        """
        if not isinstance(dense, conv1d_class() or ()):
            raise UnsupportedError(
                f"dense: expected a Conv1D of transformers, got {type(dense).__name__}"
            )
        return cls._copy_of(dense, mask, sparsity, layout)

    def to_dense(self) -> Any:
        """Return a Conv1D of transformers with the zeros stored.

        Raises:
            UnsupportedError: transformers cannot be imported.
        """
        kind = _import_conv1d()
        with torch.device("meta"):
            dense = kind(self.out_features, self.in_features)
        if self.bias is None:
            dense.bias = torch.nn.Parameter(self.values.new_zeros(self.out_features))
        return self._fill_dense(dense)


def _import_conv1d() -> Any:
    """Import the class, as a module that comes out of a pickle may be the first to need it."""
    try:
        return importlib.import_module("transformers.pytorch_utils").Conv1D
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(
            f"to_dense: expected transformers, which has the class Conv1D, got: {error}"
        ) from error
