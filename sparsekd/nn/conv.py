"""The weight-sparse convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

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
_Conv = TypeVar("_Conv", "SparseConv2d", "SparseConv1d")
_Dense = TypeVar("_Dense", nn.Conv2d, nn.Conv1d)

_ARGUMENTS = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
    "padding_mode",
)  # fmt: skip
"""Arguments of a convolution, dense or sparse, that are attributes too."""


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
        _check(in_channels, out_channels, groups, padding_mode)
        padding = padding if isinstance(padding, str) else _sizes("padding", padding, 2, least=0)
        kernel_size = _sizes("kernel_size", kernel_size, 2)
        stride, dilation = _sizes("stride", stride, 2), _sizes("dilation", dilation, 2)
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
        sparse = _copy_of(cls, nn.Conv2d, dense, mask, sparsity, layout)
        sparse.channels_last = memory_format_of(dense.weight) is torch.channels_last
        return sparse

    def to_dense(self) -> nn.Conv2d:
        """Return an nn.Conv2d with the zeros stored.

        Example:
            >>> import sparsekd as skd
            >>> skd.nn.SparseConv2d(4, 8, 3, padding=1, sparsity=0.5).to_dense()
            Conv2d(4, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
        """
        dense = self._fill_dense(_dense_like(self, nn.Conv2d))
        if self.channels_last:
            dense.weight.data = dense.weight.data.clone(memory_format=torch.channels_last)
        return dense

    def extra_repr(self) -> str:
        return _describe(self)


class SparseConv1d(SparseModule):
    """1-D convolution that stores and computes only the nonzeros of its weight.

    A drop-in replacement for nn.Conv1d, and in all but its shapes a SparseConv2d: it convolves maps
    of height 1.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: its length.
        stride: one number, as all that follow.
        padding: a number, "valid" or "same".
        dilation: distance of the taps.
        groups: number of groups of channels that do not see each other.
        bias: whether to add a bias.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        sparsity: fraction of zeros, as of SparseConv2d.
        seed: seed of mask, values and bias.
        mask: where the nonzeros are, instead of a random choice of `sparsity`.
        layout: structure of this and all later masks, as of SparseConv2d.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - Input: [N, in_channels, L] or [in_channels, L]
        - Output: [N, out_channels, L_out] or [out_channels, L_out]
        - values: [nnz], the nonzeros of the weight [out_channels, in_channels/groups, k] in
          row-major order

    Raises:
        ValueError, ShapeError, UnsupportedError, TopologyError: as SparseConv2d.

    Example:
        >>> import torch, sparsekd as skd
        >>> conv = skd.nn.SparseConv1d(64, 128, 3, padding=1, sparsity=0.9, seed=0)
        >>> conv(torch.randn(2, 64, 20)).shape, conv.topology.nnz
        (torch.Size([2, 128, 20]), 2458)
    """

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
        _check(in_channels, out_channels, groups, padding_mode)
        padding = padding if isinstance(padding, str) else _sizes("padding", padding, 1, least=0)
        (length,) = kernel_size = _sizes("kernel_size", kernel_size, 1)
        (step,) = stride = _sizes("stride", stride, 1)
        (spread,) = dilation = _sizes("dilation", dilation, 1)
        across = padding if isinstance(padding, str) else (0, *padding)
        sides = resolve_padding(across, (1, length), (1, step), (1, spread))
        shape = (out_channels, in_channels // groups, length)
        layout = Layout.parse(layout)
        mask, generator = initial_mask(shape, mask, sparsity, seed, layout)
        super().__init__(mask, bias=bias, layout=layout, device=device, dtype=dtype)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
        self.padding, self.padding_mode = padding, padding_mode
        self._geometry = (1, step), sides, (1, spread), groups
        self.reset_parameters(generator)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of `x` with the weight, plus the bias."""
        if isinstance(x, Proxy) and stays_whole(self, SparseConv1d.forward, x):
            return call_module(self, x)
        self._watch()
        rows, channels, length = self.weight_shape
        return functional.convolve(
            x.unsqueeze(-2),
            *self._operands(),
            (rows, channels, 1, length),
            *self._geometry,
            padding_mode=self.padding_mode,
        ).squeeze(-2)

    @classmethod
    def from_dense(
        cls,
        dense: nn.Conv1d,
        mask: Tensor | None = None,
        *,
        sparsity: float | None = None,
        layout: str | Layout = "csr",
    ) -> SparseConv1d:
        """Copy a dense convolution, as `SparseConv2d.from_dense` does.

        Args:
            dense: the convolution; it is left as it is.
            mask: which weights to keep; bool tensor of the weight's shape.
            sparsity: instead of `mask`: fraction of weights to remove, the smallest ones.
            layout: structure of the sparse module's masks.

        Raises:
            ValueError, UnsupportedError, ShapeError, TopologyError: as `SparseConv2d.from_dense`.
        """
        return _copy_of(cls, nn.Conv1d, dense, mask, sparsity, layout)

    def to_dense(self) -> nn.Conv1d:
        """Return an nn.Conv1d with the zeros stored."""
        return self._fill_dense(_dense_like(self, nn.Conv1d))

    def extra_repr(self) -> str:
        return _describe(self)


# torch.fx writes the annotations of what it traces into a graph, and cannot pickle strings there.
SparseConv2d.forward.__annotations__ = {"x": Tensor, "return": Tensor}
SparseConv1d.forward.__annotations__ = {"x": Tensor, "return": Tensor}


def _check(in_channels: int, out_channels: int, groups: int, padding_mode: str) -> None:
    if groups < 1 or in_channels % groups or out_channels % groups:
        raise ShapeError(
            f"groups: expected a divisor of in_channels={in_channels} and "
            f"out_channels={out_channels}, got {groups}"
        )
    if padding_mode not in PADDING_MODES:
        raise UnsupportedError(
            f"padding_mode: expected one of {', '.join(PADDING_MODES)}, got {padding_mode!r}"
        )


def _sizes(name: str, size: _Size, count: int, least: int = 1) -> tuple[int, ...]:
    sizes = (size,) * count if isinstance(size, int) else tuple(size)
    if len(sizes) != count or min(sizes) < least:
        numbers = "one or two numbers" if count == 2 else "one number"
        raise ShapeError(f"{name}: expected {numbers} of at least {least}, got {size}")
    return sizes


def _copy_of(
    cls: type[_Conv],
    kind: Any,
    dense: Any,
    mask: Tensor | None,
    sparsity: float | None,
    layout: str | Layout,
) -> _Conv:
    if not isinstance(dense, kind):
        raise UnsupportedError(f"dense: expected an nn.{kind.__name__}, got {type(dense).__name__}")
    layout = Layout.parse(layout)
    mask = dense_mask(dense, mask, sparsity, layout)
    weight: Tensor = dense.weight
    sparse = cls(
        **_arguments(dense),
        bias=dense.bias is not None,
        mask=mask,
        layout=layout,
        device=weight.device,
        dtype=weight.dtype,
    )
    return copy_dense_(sparse, dense)


def _dense_like(conv: SparseConv2d | SparseConv1d, kind: type[_Dense]) -> _Dense:
    """Return a dense convolution without weights."""
    return kind(**_arguments(conv), bias=conv.bias is not None, device="meta")


def _arguments(conv: Any) -> dict[str, Any]:
    return {name: getattr(conv, name) for name in _ARGUMENTS}


def _describe(conv: SparseConv2d | SparseConv1d) -> str:
    parts = [
        f"{conv.in_channels}, {conv.out_channels}",
        f"kernel_size={conv.kernel_size}, stride={conv.stride}",
    ]
    ones = tuple(1 for _ in conv.kernel_size)
    defaults = {
        "padding": tuple(0 for _ in ones),
        "dilation": ones,
        "groups": 1,
        "padding_mode": "zeros",
    }
    for name, default in defaults.items():
        if (value := getattr(conv, name)) != default:
            parts.append(f"{name}={value!r}")
    if conv.bias is None:
        parts.append("bias=False")
    return ", ".join([*parts, conv._describe_topology()])
