"""Derivatives of every order, and that only the needed ones are computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparsekd import Topology, functional, ops

GEOMETRIES = {
    "plain": {"padding": 1},
    "strided": {"stride": (2, 1), "padding": (1, 0, 2, 1), "dilation": (1, 2)},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
}


def conv_inputs(groups: int = 1) -> tuple[Topology, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    topology = Topology.from_mask(torch.rand(4, 4 // groups, 3, 2, generator=generator) < 0.4)
    sizes = ((topology.nnz,), (2, 4, 3, 4), (4,))
    tensors = [
        torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in sizes
    ]
    return topology, tensors


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_conv2d_gradcheck(backend: str, options: dict, groups: int) -> None:
    topology, inputs = conv_inputs(groups)

    def run(values: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        return functional.conv2d(topology, values, x, bias, groups=groups, **options)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("size", [(6,), (3, 6), (2, 3, 6), (0, 6)])
def test_linear_gradcheck(backend: str, size: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(2)
    topology = Topology.from_mask(torch.rand(5, 6, generator=generator) < 0.5)
    inputs = [
        torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True)
        for s in ((topology.nnz,), size, (5,))
    ]

    def run(values: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        return functional.linear(topology, values, x, bias)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_spmm_and_sddmm_gradcheck(backend: str) -> None:
    generator = torch.Generator().manual_seed(3)
    topology = Topology.from_mask(torch.rand(4, 5, generator=generator) < 0.5)
    values, x, a, b = (
        torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True)
        for s in ((topology.nnz,), (5, 3), (4, 3), (3, 5))
    )
    for run, inputs in (
        (lambda v, m: functional.spmm(topology, v, m), (values, x)),
        (lambda left, right: functional.sddmm(topology, left, right), (a, b)),
    ):
        assert torch.autograd.gradcheck(run, inputs)
        assert torch.autograd.gradgradcheck(run, inputs)


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "sparsekd":
            self.calls.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "needed, expected",
    [
        ("values", ["conv2d", "conv2d_wgrad"]),
        ("x", ["conv2d", "conv2d_dgrad"]),
        ("bias", ["conv2d"]),
        ("", ["conv2d"]),
    ],
)
def test_only_needed_gradients_are_computed(backend: str, needed: str, expected: list[str]) -> None:
    topology, inputs = conv_inputs()
    named = dict(zip(("values", "x", "bias"), inputs, strict=True))
    leaves = {name: leaf.detach() for name, leaf in named.items()}
    if needed:
        leaves[needed].requires_grad_()
    with Recorder() as recorder:
        y = functional.conv2d(topology, leaves["values"], leaves["x"], leaves["bias"])
        if needed:
            y.sum().backward()
    assert recorder.calls == expected


def test_what_no_gradient_needs_is_not_kept(backend: str) -> None:
    topology, (values, x, _) = conv_inputs()
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        functional.conv2d(topology, values.detach(), x)
        assert tuple(x.shape) not in kept
        functional.conv2d(topology, values, x.detach())
        assert tuple(x.shape) in kept


OPS: dict[str, Callable[..., tuple]] = {
    "conv2d": lambda s, x, v, g, b: (x, v, *s, b, *CONV),
    "conv2d_dgrad": lambda s, x, v, g, b: (g, v, *s, list(x.shape), *CONV),
    "conv2d_wgrad": lambda s, x, v, g, b: (g, x, *s, *CONV),
    "linear": lambda s, x, v, g, b: (x, v, *s, b, [4, 24]),
    "linear_dgrad": lambda s, x, v, g, b: (g, v, *s, [4, 24]),
    "linear_wgrad": lambda s, x, v, g, b: (g, x, *s, [4, 24]),
}
CONV = ([4, 4, 3, 2], [1, 1], [1, 1, 0, 1], [1, 1], 1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", OPS)
def test_opcheck(backend: str, name: str, layout: torch.memory_format) -> None:
    topology, (values, x, bias) = conv_inputs()
    grad = torch.randn(2, 4, 3, 4, dtype=torch.float64)
    if name.startswith("linear"):
        x = torch.randn(3, 24, dtype=torch.float64)
        grad = torch.randn(3, 4, dtype=torch.float64)
    elif layout == torch.channels_last:
        x, grad = (t.detach().contiguous(memory_format=layout) for t in (x, grad))
    structure = topology.crow_indices, topology.col_indices
    args = OPS[name](structure, x.detach().requires_grad_(), values, grad.requires_grad_(), bias)
    torch.library.opcheck(getattr(ops, name), args)


def test_opcheck_grow_topk(backend: str) -> None:
    topology, _ = conv_inputs()
    score = torch.rand(topology.shape)
    args = (score, topology.crow_indices, topology.col_indices, 7)
    torch.library.opcheck(ops.grow_topk, args)
