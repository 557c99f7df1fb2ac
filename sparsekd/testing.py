"""Helpers to test sparse layers: random configurations, the dense oracle, computed tolerances.

The oracle is dense torch in float64 on the masked weight. Errors are relative to the largest
entry of the expected tensor; tolerances grow with the square root of the number of summands.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekd import functional
from sparsekd.layouts import Tiling
from sparsekd.ops import info
from sparsekd.sparsity import outputs_first
from sparsekd.topology import Topology

LAYOUTS = ("contiguous", "channels_last", "sliced", "permuted", "expanded", "unbatched")


@dataclass(frozen=True)
class LayerCase:
    """A random layer and its input: a convolution or, with `kernel_size` None, a linear layer.

    Its mask consists of tiles of `tile[0]` output times `tile[1]` input channels.

    Example:
        >>> case = random_layer(0)
        >>> assert_layer_matches_dense(case)
    """

    seed: int
    in_features: int
    out_features: int
    batch: tuple[int, ...]
    density: float
    bias: bool
    dtype: torch.dtype
    layout: str
    kernel_size: tuple[int, int] | None = None
    map_size: tuple[int, int] = (1, 1)
    empty_rows: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    tile: tuple[int, int] = (1, 1)

    def tensors(
        self, device: torch.device | str = "cpu"
    ) -> tuple[Topology, Tensor, Tensor, Tensor | None]:
        """Return `(topology, values, x, bias)`, the same ones on every call and device."""
        generator = torch.Generator().manual_seed(self.seed)
        shape: tuple[int, ...] = (self.out_features, self.in_features)
        if self.kernel_size is not None:
            groups = self.options.get("groups", 1)
            shape = (self.out_features, self.in_features // groups, *self.kernel_size)
        tiling = Tiling(torch.Size(shape), *self.tile)
        mask = tiling.expand(torch.rand(tiling.grid, generator=generator) < self.density)
        if self.empty_rows:
            mask[torch.rand(shape[0], generator=generator) < 0.5] = False
        topology = Topology.from_mask(mask)

        def random_tensor(*size: int) -> Tensor:
            drawn = torch.randn(size, generator=generator, dtype=torch.float64)
            return drawn.to(device, self.dtype)

        maps = () if self.kernel_size is None else self.map_size
        size = (*self.batch, self.in_features, *maps)
        x = with_layout(random_tensor(*size), self.layout)
        bias = random_tensor(shape[0]) if self.bias else None
        return topology.to(device), random_tensor(topology.nnz), x, bias

    @property
    def summands(self) -> int:
        """Upper bound on the number of products in any sum of forward or backward."""
        kernel = math.prod(self.kernel_size or (1,))
        positions = math.prod(self.batch) * math.prod(self.map_size) * 16
        return max(self.in_features, self.out_features) * kernel + positions


def with_layout(x: Tensor, layout: str) -> Tensor:
    """Return a tensor equal to `x` (first entry repeated if "expanded") in another memory layout.

    Args:
        x: maps `[N, C, H, W]` or rows of features.
        layout: one of `LAYOUTS`; channels_last is left alone where `x` is not 4-D.
    """
    if layout == "channels_last" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 3), float("nan"))
        wide[..., 1 : 2 * x.shape[-1] : 2] = x
        return wide[..., 1 : 2 * x.shape[-1] : 2]
    if layout == "permuted":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded" and x.ndim > 1 and x.shape[0] > 0:
        return x[:1].expand(x.shape)
    return x


def random_layer(seed: int) -> LayerCase:
    """Draw a layer from the whole supported range.

    Rectangular kernels, stride, every kind of padding, dilation, groups, depthwise, bias, both
    dtypes, every memory layout, batch 0, no nonzeros, empty rows, full density.

    Args:
        seed: of the draw.

    Example:
        >>> random_layer(3) == random_layer(3)
        True
    """
    draw = random.Random(seed)
    common: dict[str, Any] = {
        "seed": seed,
        "density": draw.choice((0.0, 0.03, 0.1, 0.1, 0.3, 0.3, 0.6, 1.0)),
        "bias": draw.random() < 0.5,
        "dtype": draw.choice((torch.float32, torch.float64)),
        "layout": draw.choice(LAYOUTS),
        "empty_rows": draw.random() < 0.3,
    }
    if draw.random() < 0.25:
        batch = draw.choice(((), (0,), (1,), (7,), (33,), (2, 3), (5, 0), (2, 3, 4)))
        return LayerCase(
            in_features=draw.randint(1, 90),
            out_features=draw.randint(1, 70),
            batch=batch,
            **common,
        )
    return _random_conv2d(draw, common)


def _random_conv2d(draw: random.Random, common: dict[str, Any]) -> LayerCase:
    groups = draw.choice((1, 1, 1, 2, 3, 8))
    depthwise = groups == 8
    in_features = groups * (1 if depthwise else draw.randint(1, 11))
    out_features = groups * draw.randint(1, 3 if depthwise else 11)
    kernel = draw.choice(((1, 1), (3, 3), (3, 3), (draw.randint(1, 5), draw.randint(1, 5))))
    dilation = draw.choice(((1, 1), (1, 1), (draw.randint(1, 3), draw.randint(1, 3))))
    stride = draw.choice(((1, 1), (1, 1), (2, 2), (draw.randint(1, 3), draw.randint(1, 3))))
    extent = [step * (size - 1) + 1 for step, size in zip(dilation, kernel, strict=True)]
    maps = (draw.randint(0, 9) + extent[0], draw.randint(0, 9) + extent[1])
    padding: Any = draw.choice(
        (
            0,
            1,
            (draw.randint(0, 2), draw.randint(0, 2)),
            tuple(draw.randint(0, 3) for _ in range(4)),
            "valid",
            "same" if max(stride) == 1 else 0,
        )
    )
    mode = draw.choice(("zeros", "zeros", "reflect", "replicate", "circular"))
    sides = functional.resolve_padding(padding, kernel, stride, dilation)
    if mode == "reflect" and (max(sides[:2]) >= maps[0] or max(sides[2:]) >= maps[1]):
        mode = "zeros"  # a reflection cannot be wider than what it reflects
    if mode == "circular" and (max(sides[:2]) > maps[0] or max(sides[2:]) > maps[1]):
        mode = "zeros"
    options = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "padding_mode": mode,
    }
    batch = () if common["layout"] == "unbatched" else (draw.choice((0, 1, 2, 5, 8, 17)),)
    return LayerCase(
        in_features=in_features,
        out_features=out_features,
        batch=batch,
        kernel_size=kernel,
        map_size=maps,
        options=options,
        **common,
    )


def dense_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """Compute the dense convolution that `functional.conv2d` must agree with."""
    steps = (stride, stride) if isinstance(stride, int) else stride
    dilations = (dilation, dilation) if isinstance(dilation, int) else dilation
    sides = functional.resolve_padding(padding, weight.shape[2:], steps, dilations)
    top, bottom, left, right = sides
    batched = x if x.ndim == 4 else x[None]
    if any(sides):
        mode = "constant" if padding_mode == "zeros" else padding_mode
        batched = F.pad(batched, (left, right, top, bottom), mode=mode)
    y = F.conv2d(batched, weight, bias, stride, 0, dilation, groups)
    return y if x.ndim == 4 else y[0]


def dense_results(case: LayerCase, grad: Tensor | None = None) -> dict[str, Tensor]:
    """Compute output and gradients of a case by dense torch in float64."""
    topology, values, x, bias = case.tensors()
    mask = topology.mask()
    weight = torch.zeros(mask.shape, dtype=torch.float64)
    weight[mask] = values.double()
    leaves = {"x": x.detach().double(), "weight": weight}
    if bias is not None:
        leaves["bias"] = bias.double()
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    if case.kernel_size is None:
        y = F.linear(leaves["x"], leaves["weight"], leaves.get("bias"))
    else:
        y = dense_conv2d(leaves["x"], leaves["weight"], leaves.get("bias"), **case.options)
    results = _with_gradients(y, leaves, grad, case.dtype)
    results["values"] = results.pop("weight")[mask]
    return results


def sparse_results(
    case: LayerCase, grad: Tensor | None = None, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Compute output and gradients of a case by sparsekd, on the current backend."""
    topology, values, x, bias = case.tensors(device)
    leaves = {"x": x.detach().requires_grad_(), "values": values.requires_grad_()}
    if bias is not None:
        leaves["bias"] = bias.requires_grad_()
    if case.kernel_size is None:
        y = functional.linear(topology, leaves["values"], leaves["x"], leaves.get("bias"))
    else:
        args = (topology, leaves["values"], leaves["x"], leaves.get("bias"))
        y = functional.conv2d(*args, **case.options)
    return _with_gradients(y, leaves, grad, case.dtype)


def _with_gradients(
    y: Tensor, leaves: dict[str, Tensor], grad: Tensor | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return `y` and the gradients of the leaves; the output gradient is rounded to `dtype`."""
    if grad is None:
        generator = torch.Generator().manual_seed(y.numel())
        grad = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad(y, list(leaves.values()), grad.to(dtype).to(y))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Compute the largest error relative to the largest expected entry; inf if not finite."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    if expected.numel() == 0:
        return 0.0
    difference = (actual.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    if not math.isfinite(difference):
        return math.inf
    return difference / scale if scale else (math.inf if difference else 0.0)


def tolerance(dtype: torch.dtype, summands: int) -> float:
    """Return the relative error that rounding may cause in a sum: `8 * eps * sqrt(summands)`.

    Args:
        dtype: what the sum is computed in.
        summands: how many products it adds up.

    Example:
        >>> tolerance(torch.float32, 1000) < 1e-4
        True
    """
    return 8 * torch.finfo(dtype).eps * math.sqrt(max(summands, 1))


def assert_layer_matches_dense(
    case: LayerCase, limit: float | None = None, device: torch.device | str = "cpu"
) -> None:
    """Fail unless output and every gradient of the case equal dense torch on the CPU.

    Args:
        case: the layer.
        limit: relative error allowed; computed from dtype and size if None.
        device: where the layer runs.

    Raises:
        AssertionError: names the tensor, its error and the case.
    """
    allowed = tolerance(case.dtype, case.summands) if limit is None else limit
    expected, actual = dense_results(case), sparse_results(case, device=device)
    for name, tensor in expected.items():
        error = relative_error(actual[name].cpu(), tensor)
        if error > allowed:
            raise AssertionError(f"{name}: relative error {error:.3g} > {allowed:.3g} for {case}")


class SparseModule(Protocol):
    """The part of a sparse module that `assert_matches_dense` uses."""

    values: Tensor
    bias: Tensor | None
    topology: Topology

    def to_dense(self) -> nn.Module: ...

    def __call__(self, x: Tensor) -> Tensor: ...


def assert_matches_dense(module: SparseModule, x: Tensor, limit: float | None = None) -> None:
    """Fail unless a sparse module agrees with its own dense twin, gradients included.

    Args:
        module: a SparseConv2d, SparseLinear or SparseConv1D.
        x: an input for it.
        limit: relative error allowed; computed from dtype and size if None.

    Raises:
        AssertionError: names the tensor and its error.

    Example:
        >>> import sparsekd as skd
        >>> assert_matches_dense(skd.nn.SparseLinear(8, 4, sparsity=0.5), torch.randn(3, 8))
    """
    dense: Any = module.to_dense().double()
    sparse_leaves = {"x": x.detach().clone().requires_grad_(), "values": module.values}
    dense_leaves = {"x": x.detach().double().requires_grad_(), "values": dense.weight}
    if module.bias is not None:
        sparse_leaves["bias"], dense_leaves["bias"] = module.bias, dense.bias
    actual = _with_gradients(module(sparse_leaves["x"]), sparse_leaves, None, x.dtype)
    expected = _with_gradients(dense(dense_leaves["x"]), dense_leaves, None, x.dtype)
    expected["values"] = outputs_first(dense, expected["values"])[module.topology.mask()]
    summands = max(x.numel(), expected["y"].numel(), module.topology.cols)
    allowed = tolerance(x.dtype, summands) if limit is None else limit
    for name, tensor in expected.items():
        error = relative_error(actual[name], tensor)
        if error > allowed:
            raise AssertionError(f"{name}: relative error {error:.3g} > {allowed:.3g}")


def available_backends() -> list[str]:
    """Return the names of the backends that can run here.

    Example:
        >>> "reference" in available_backends()
        True
    """
    return [name for name, entry in info()["backends"].items() if entry["available"]]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill uninitialised tensors with NaN, so that entries a kernel does not write show up.

    Example:
        >>> with poisoned_memory():
        ...     bool(torch.empty(3).isnan().all())
        True
    """
    memory: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        memory.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = before[2]
