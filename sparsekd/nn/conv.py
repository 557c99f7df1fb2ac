"""The weight-sparse convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from sparsekd import functional
from sparsekd.errors import ShapeError, UnsupportedError
from sparsekd.functional import PADDING_MODES, resolve_padding
from sparsekd.layouts import Layout
from sparsekd.nn.base import SparseModule, copy_dense_
from sparsekd.nn.masks import dense_mask, initial_mask
from sparsekd.ops.memory_format import memory_format_of
from sparsekd.tracing import call_module, stays_whole

_Size = int | Sequence[int]


class SparseConv2d(SparseModule):
    """2-D convolution that stores and computes only the nonzeros of its weight.

    A drop-in replacement for nn.Conv2d. Mask, values and bias are drawn from a generator of their
    own, so equal arguments give equal modules and torch's global generator is left alone.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: one number or (height, width).
        stride: one number or (vertical, horizontal).
        padding: one number, (vertical, horizontal), "valid" or "same".
        dilation: one number or (vertical, horizontal).
        groups: number of groups of channels that do not see each other.
        bias: whether to add a bias.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        sparsity: fraction of zeros; exactly `round((1 - sparsity) * N)` weights are stored, or
            the nearest number of whole tiles where the layout has tiles.
        seed: seed of mask, values and bias.
        mask: where the nonzeros are, instead of a random choice of `sparsity`.
        layout: structure of this and all later masks: "csr" (any mask), "bcsr", "fanin" or "nm",
            or a `sparsekd.Layout` with its numbers.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - Input: [N, in_channels, H, W] or [in_channels, H, W]
        - Output: [N, out_channels, H_out, W_out] or [out_channels, H_out, W_out]
        - values: [nnz], the nonzeros of the weight [out_channels, in_channels/groups, kh, kw] in
          row-major order

    Raises:
        ValueError: if `sparsity` is outside [0, 1], or not the one that "nm" has.
        ShapeError: if the channels do not divide into `groups`, a size is not positive, or `mask`
            does not have the weight's shape.
        UnsupportedError: if `padding`, `padding_mode` or `layout` is not known, "same" has a
            stride, or `mask` does not fit `layout`.
        TopologyError: if `mask` is not bool.

    Source: Evci et al., Gradient Flow in Sparse Neural Networks, section 3, for the initialisation.

    Example:
        >>> import torch, sparsekd as skd
        >>> conv = skd.nn.SparseConv2d(64, 128, 3, padding=1, sparsity=0.9, seed=0)
        >>> conv(torch.randn(2, 64, 8, 8)).shape, conv.topology.nnz
        (torch.Size([2, 128, 8, 8]), 7373)
    """

    channels_last = False
    """Whether the result is in channels_last also where the input is not, as a dense convolution's
    is when its weight is."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Size,
        stride: _Size = 1,
        padding: _Size | str = 0,
        dilation: _Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        sparsity: float = 0.9,
        seed: int = 0,
        *,
        mask: Tensor | None = None,
        layout: str | Layout = "csr",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ShapeError(
                f"groups: expected a divisor of in_channels={in_channels} and "
                f"out_channels={out_channels}, got {groups}"
            )
        if padding_mode not in PADDING_MODES:
            raise UnsupportedError(
                f"padding_mode: expected one of {', '.join(PADDING_MODES)}, got {padding_mode!r}"
            )
        padding = padding if isinstance(padding, str) else _pair("padding", padding, least=0)
        kernel_size = _pair("kernel_size", kernel_size)
        stride, dilation = _pair("stride", stride), _pair("dilation", dilation)
        sides = resolve_padding(padding, kernel_size, stride, dilation)
        shape = (out_channels, in_channels // groups, *kernel_size)
        layout = Layout.parse(layout)
        mask, generator = initial_mask(shape, mask, sparsity, seed, layout)
        super().__init__(mask, bias=bias, layout=layout, device=device, dtype=dtype)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
        self.padding, self.padding_mode = padding, padding_mode
        self._sides = sides  # top, bottom, left, right
        self.reset_parameters(generator)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of `x` with the weight, plus the bias."""
        if isinstance(x, Proxy) and stays_whole(self, SparseConv2d.forward, x):
            return call_module(self, x)
        self._watch()
        return functional.convolve(
            x,
            *self._operands(),
            self.weight_shape,
            self.stride,
            self._sides,
            self.dilation,
            self.groups,
            padding_mode=self.padding_mode,
            channels_last=self.channels_last,
        )

    @classmethod
    def from_dense(
        cls,
        dense: nn.Conv2d,
        mask: Tensor | None = None,
        *,
        sparsity: float | None = None,
        layout: str | Layout = "csr",
    ) -> SparseConv2d:
        """Copy a dense convolution, keeping the weights of `mask` or those of largest magnitude.

        Args:
            dense: the convolution; it is left as it is.
            mask: which weights to keep; bool tensor of the weight's shape.
            sparsity: instead of `mask`: fraction of weights to remove, the smallest ones; of equal
                magnitudes the one at the lower index stays. Where the layout has tiles, those of
                the smallest mean magnitude go.
            layout: structure of the sparse module's masks.

        Returns:
            A sparse convolution with the dense one's device, dtype and training mode.

        Raises:
            ValueError: unless exactly one of `mask` and `sparsity` is given.
            UnsupportedError: if `dense` is no nn.Conv2d with a floating-point weight, or `mask`
                does not fit `layout`.
            ShapeError, TopologyError: if `mask` does not fit the weight.

        Example:
            >>> import torch, sparsekd as skd
            >>> conv = torch.nn.Conv2d(8, 8, 3, padding="same", bias=False)
            >>> skd.nn.SparseConv2d.from_dense(conv, sparsity=0.75).topology.nnz
            144
        """
        if not isinstance(dense, nn.Conv2d):
            raise UnsupportedError(f"dense: expected an nn.Conv2d, got {type(dense).__name__}")
        layout = Layout.parse(layout)
        mask = dense_mask(dense, mask, sparsity, layout)
        sparse = cls(
            dense.in_channels,
            dense.out_channels,
            dense.kernel_size,
            dense.stride,
            dense.padding,
            dense.dilation,
            dense.groups,
            dense.bias is not None,
            dense.padding_mode,
            mask=mask,
            layout=layout,
            device=dense.weight.device,
            dtype=dense.weight.dtype,
        )
        sparse.channels_last = memory_format_of(dense.weight) is torch.channels_last
        return copy_dense_(sparse, dense)

    def to_dense(self) -> nn.Conv2d:
        """Return an nn.Conv2d with the zeros stored.

        Example:
            >>> import sparsekd as skd
            >>> skd.nn.SparseConv2d(4, 8, 3, padding=1, sparsity=0.5).to_dense()
            Conv2d(4, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
        """
        dense = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            self.padding_mode,  # type: ignore[arg-type]
            device="meta",
        )
        dense = self._fill_dense(dense)
        if self.channels_last:
            dense.weight.data = dense.weight.data.clone(memory_format=torch.channels_last)
        return dense

    def extra_repr(self) -> str:
        parts = [
            f"{self.in_channels}, {self.out_channels}",
            f"kernel_size={self.kernel_size}, stride={self.stride}",
        ]
        defaults = {"padding": (0, 0), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
        for name, default in defaults.items():
            if (value := getattr(self, name)) != default:
                parts.append(f"{name}={value!r}")
        if self.bias is None:
            parts.append("bias=False")
        return ", ".join([*parts, self._describe_topology()])


# torch.fx writes the annotations of what it traces into a graph, and cannot pickle strings there.
SparseConv2d.forward.__annotations__ = {"x": Tensor, "return": Tensor}


def _pair(name: str, size: _Size, least: int = 1) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < least:
        raise ShapeError(f"{name}: expected one or two numbers of at least {least}, got {size}")
    return pair[0], pair[1]
