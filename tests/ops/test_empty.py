"""Sizes of zero: what torch makes of them, or a ShapeError; never the end of the process.

The compiled module divides by sizes. A division by zero there raises a signal, so what is called
with hostile arguments runs in a process of its own.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sparsekd as skd
from sparsekd import ops
from sparsekd.errors import ShapeError
from sparsekd.topology import Topology

SIZES = (0, 1, 3)


def half(shape: tuple[int, ...]) -> Tensor:
    """Return a mask of every other position."""
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[::2] = True
    return mask


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def check_equal(ours: list[Tensor], expected: list[Tensor]) -> None:
    for got, wanted in zip(ours, expected, strict=True):
        assert got.shape == wanted.shape
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9, equal_nan=True)


def results(y: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return an output and, of a sum that weighs its entries differently, the gradients."""
    weights = torch.arange(y.numel(), dtype=y.dtype).view(y.shape)
    return [y, *torch.autograd.grad((y * weights).sum(), inputs)]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", [[0] * 4, [1] * 4, [2, 1, 0, 2]], ids=str)
@pytest.mark.parametrize("kernel", [1, 2])
def test_convolutions(backend: str, kernel: int, padding: list[int], groups: int) -> None:
    mask = half((4, 2, kernel, kernel))
    topology = Topology.from_mask(mask)
    top, bottom, left, right = padding
    for batch, high, wide in itertools.product(SIZES, SIZES, SIZES):
        x, values, bias = leaf(batch, 2 * groups, high, wide), leaf(topology.nnz), leaf(4)
        indices = topology.crow_indices, topology.col_indices
        geometry = list(mask.shape), [1, 1], padding, [1, 1], groups
        if high + top + bottom < kernel or wide + left + right < kernel:
            with pytest.raises(ShapeError, match="no smaller than the kernel"):
                ops.conv2d(x, values, *indices, bias, *geometry)
            continue
        y = ops.conv2d(x, values, *indices, bias, *geometry)
        weight = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, values)
        expected = F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, groups=groups)
        check_equal(results(y, (x, values, bias)), results(expected, (x, values, bias)))


@pytest.mark.parametrize("shape", [(0, 2, 1, 1), (2, 0, 1, 1), (2, 2, 0, 1), (2, 2, 1, 0)], ids=str)
def test_convolutions_by_a_weight_without_elements(backend: str, shape: tuple[int, ...]) -> None:
    topology = Topology.from_mask(half(shape))
    x = torch.ones(2, shape[1], 4, 4)
    args = topology.crow_indices, topology.col_indices, None, list(shape)
    with pytest.raises(ShapeError, match=r"weight: expected at least one element, got shape \["):
        ops.conv2d(x, torch.ones(0), *args, [1, 1], [0] * 4, [1, 1], 1)


@pytest.mark.parametrize(
    ("batch", "rows", "cols"), list(itertools.product([(0,), (3,), (2, 0), ()], SIZES, SIZES))
)
def test_linear_layers(backend: str, batch: tuple[int, ...], rows: int, cols: int) -> None:
    mask = half((rows, cols))
    topology = Topology.from_mask(mask)
    x, values, bias = leaf(*batch, cols), leaf(topology.nnz), leaf(rows)
    indices = topology.crow_indices, topology.col_indices
    y = ops.linear(x, values, *indices, bias, [rows, cols])
    weight = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, values)
    expected = F.linear(x, weight, bias)
    check_equal(results(y, (x, values, bias)), results(expected, (x, values, bias)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "shape", [s for s in itertools.product((0, 2), (0, 2), (0, 1), (0, 1)) if 0 in s], ids=str
)
def test_norms(backend: str, shape: tuple[int, ...], layout: torch.memory_format) -> None:
    x, residual = (leaf(*shape).contiguous(memory_format=layout) for _ in range(2))
    weight, bias = leaf(shape[1]), leaf(shape[1])
    moments = ops.batch_moments(x)
    assert all(m.shape == (shape[1],) and m.isnan().all() for m in moments), "as of torch.var_mean"
    for added, frozen, relu in itertools.product((False, True), repeat=3):
        known = (torch.zeros(shape[1]).double(), torch.ones(shape[1]).double())
        mean, var = known if frozen else moments
        y = ops.norm_act(
            x, residual if added else None, weight, bias, mean, var, 1e-5, relu, frozen
        )
        assert y.shape == x.shape
        inputs = (x, weight, bias, *((residual,) if added else ()))
        for gradient, wanted in zip(torch.autograd.grad(y.sum(), inputs), inputs, strict=True):
            assert gradient.shape == wanted.shape
            assert not gradient.any(), "the gradient of an empty sum, in torch as well"


@pytest.mark.parametrize(("rows", "cols"), list(itertools.product(SIZES, SIZES)))
def test_growth(backend: str, rows: int, cols: int) -> None:
    topology = Topology.from_mask(half((rows, cols)))
    free = topology.numel - topology.nnz
    score = torch.rand(rows, cols)
    indices = topology.crow_indices, topology.col_indices
    grown = ops.grow_topk(score, *indices, free)
    assert grown.tolist() == (~topology.mask()).flatten().nonzero().flatten().tolist()
    assert ops.grow_topk(score, *indices, 0).tolist() == []
    with pytest.raises(ShapeError, match="k: expected 0 <= k <="):
        ops.grow_topk(score, *indices, free + 1)


@pytest.mark.parametrize(("rows", "cols"), list(itertools.product(SIZES, SIZES)))
def test_topologies(rows: int, cols: int) -> None:
    topology = Topology.from_mask(half((rows, cols)))
    assert topology.density == (topology.nnz / topology.numel if topology.numel else 0)
    assert topology.transpose().crow_indices.shape == (cols + 1,)
    assert torch.equal(topology.mask(), half((rows, cols)))
    new, delta = topology.rewire(~topology.mask())
    assert delta.carry(torch.ones(topology.nnz)).shape == (new.nnz,)


@pytest.mark.parametrize("batch", SIZES)
@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_layers_of_a_network(backend: str, layer: str, batch: int) -> None:
    linear = layer == "linear"
    torch.manual_seed(0)
    dense = torch.nn.Linear(6, 4) if linear else torch.nn.Conv2d(6, 4, 3, padding=1)
    sparse_class = skd.nn.SparseLinear if linear else skd.nn.SparseConv2d
    sparse = sparse_class.from_dense(dense, sparsity=0.5)
    x = torch.randn((batch, 6) if linear else (batch, 6, 5, 5))
    y = sparse(x)
    torch.testing.assert_close(y, sparse.to_dense()(x))
    y.sum().backward()
    assert sparse.values.grad.shape == sparse.values.shape
    assert batch or not sparse.values.grad.any()


# -- the compiled module by itself ----------------------------------------------------------------

HOSTILE = """
    import itertools
    import torch
    import sparsekd._C as C
    from sparsekd.errors import ShapeError, TopologyError, UnsupportedError

    LEAST, MOST = -2**63, 2**63 - 1
    crow, col = torch.tensor([0, 1, 2]).int(), torch.tensor([0, 1]).int()
    values, zeros = torch.ones(2), torch.zeros
    x, y = zeros(1, 2, 3, 3), zeros(1, 2, 3, 3)
    refused = 0

    def refuse(name, *args):
        global refused
        try:
            (name if callable(name) else getattr(C, name))(*args)
        except (ShapeError, TopologyError, UnsupportedError, TypeError):
            refused += 1
        else:
            raise AssertionError(f"{name}{args}")
"""
HOSTILE_CALLS = {
    "threads": """
        for threads in (0, -1, -2**31, 2**31 - 1, 1025, LEAST, MOST):
            refuse("linear", zeros(3, 2), values, crow, col, None, zeros(3, 2), threads)
            refuse("linear_dgrad", zeros(3, 2), values, crow, col, zeros(3, 2), threads)
            refuse("linear_wgrad", zeros(3, 2), zeros(3, 2), crow, col, zeros(2), threads)
            geometry = [2, 2, 1, 1], [1, 1], [0] * 4, [1, 1], 1, threads
            refuse("conv2d", x, values, crow, col, None, y, *geometry)
            refuse("conv2d_dgrad", y, values, crow, col, x, *geometry)
            refuse("conv2d_wgrad", y, x, crow, col, zeros(2), *geometry)
            refuse("conv2d_wgrad_tile", y, x, [0, 2, 0, 2], zeros(2, 2), *geometry)
            refuse("norm_moments", x, zeros(2), zeros(2), threads)
            refuse("norm_forward", x, None, None, None, zeros(2), zeros(2), 0.1, True, y, threads)
            refuse("scatter", values, crow, col, zeros(2, 2), 1, threads)
            refuse("gather", zeros(2, 2), crow, col, values, 1, threads)
            refuse(C.LargestK, crow, col, 2, 2, 1, False, threads)
            refuse("peak_flops", threads, 1e-3)
            refuse("read_bandwidth", 64, threads, 1e-3)
    """,
    "geometry": """
        for bad in (0, -1, LEAST, MOST):
            for stride, padding, dilation, groups in (
                ([bad, 1], [0] * 4, [1, 1], 1),
                ([1, bad], [0] * 4, [1, 1], 1),
                ([1, 1], [bad or -1, 0, 0, 0], [1, 1], 1),
                ([1, 1], [0] * 4, [bad, 1], 1),
                ([1, 1], [0] * 4, [1, 1], bad),
            ):
                geometry = [2, 2, 1, 1], stride, padding, dilation, groups, 1
                refuse("conv2d", x, values, crow, col, None, y, *geometry)
                refuse("conv2d_dgrad", y, values, crow, col, x, *geometry)
                refuse("conv2d_wgrad", y, x, crow, col, zeros(2), *geometry)
                refuse("conv2d_wgrad_tile", y, x, [0, 2, 0, 2], zeros(2, 2), *geometry)
            for position in range(4):
                shape = [2, 2, 1, 1]
                shape[position] = bad
                geometry = shape, [1, 1], [0] * 4, [1, 1], 1, 1
                refuse("conv2d", x, values, crow, col, None, y, *geometry)
    """,
    "tiles": """
        ones = [2, 2, 1, 1], [1, 1], [0] * 4, [1, 1], 1, 1
        for bad in (-1, LEAST, MOST, 3):
            for position in range(4):
                tile = [0, 2, 0, 2]
                tile[position] = bad
                refuse("conv2d_wgrad_tile", y, x, tile, zeros(2, 2), *ones)
        for bad in (0, -1, LEAST, MOST):
            refuse("tile_size", crow, col, 2, 2, bad, 1)
            refuse("tile_size", crow, col, 2, 2, 1, bad)
            refuse("tile_size", crow, col, bad, 2, 1, 1)
            refuse("tile_size", crow, col, 2, bad, 1, 1)
            refuse("scatter", values, crow, col, zeros(2, 2), bad, 1)
            refuse("gather", zeros(2, 2), crow, col, values, bad, 1)
        best = C.LargestK(crow, col, 2, 2, 1, False, 1)
        for bad in (-1, LEAST, MOST, 1):
            refuse(best.offer, zeros(2, 2), bad, 0, False)
            refuse(best.offer, zeros(2, 2), 0, bad, False)
            refuse(C.LargestK, crow, col, 2, 2, bad if bad != 1 else 3, False, 1)
    """,
    "elements of another type": """
        def void(*shape):
            return torch.zeros(shape, dtype=torch.complex64)

        geometry = [2, 2, 1, 1], [1, 1], [0] * 4, [1, 1], 1, 1
        for indices in ((void(3), col), (crow, void(2))):
            refuse("validate", *indices, 2, 2)
            refuse("release", *indices)
            refuse("tile_size", *indices, 2, 2, 1, 1)
            refuse("linear", zeros(3, 2), values, *indices, None, zeros(3, 2), 1)
        refuse("conv2d", void(1, 2, 3, 3), values, crow, col, None, y, *geometry)
        refuse("conv2d", x, void(2), crow, col, None, y, *geometry)
        refuse("conv2d", x, values, crow, col, void(2), y, *geometry)
        refuse("conv2d", x, values, crow, col, None, void(1, 2, 3, 3), *geometry)
        refuse("norm_moments", void(1, 2, 3, 3), zeros(2), zeros(2), 1)
        refuse("norm_moments", x, void(2), zeros(2), 1)
        refuse("norm_forward", x, void(1, 2, 3, 3), None, None, zeros(2), zeros(2), 0.1, True, y, 1)
        refuse("scatter", void(2), crow, col, zeros(2, 2), 1, 1)
        refuse("gather", void(2, 2), crow, col, values, 1, 1)
        refuse(C.LargestK(crow, col, 2, 2, 1, False, 1).offer, void(2, 2), 0, 0, False)
    """,
    "empty maps": """
        for shape in itertools.product((0, 1, 3), (0, 1, 3), (0, 1, 2), (0, 1, 2)):
            n, c, h, w = shape
            for x in (zeros(shape), zeros(n, h, w, c).permute(0, 3, 1, 2)):
                moments = torch.ones(c), torch.ones(c)
                C.norm_moments(x, *moments, 1)
                outputs = [torch.zeros_like(x) for _ in range(3)]
                C.norm_forward(x, x, None, None, *moments, 0.1, True, outputs[0], 1)
                for y, dresidual in ((None, None), outputs[:2]):
                    C.norm_backward(
                        x, x, y, None, None, *moments, 0.1, True, False, outputs[2], dresidual,
                        zeros(c), zeros(c), 1,
                    )
        refused = 1
    """,
}


@pytest.mark.parametrize("calls", HOSTILE_CALLS)
def test_hostile_arguments_are_refused_by_the_compiled_module(calls: str) -> None:
    pytest.importorskip("sparsekd._C", reason="the compiled module is not built")
    script = textwrap.dedent(HOSTILE) + textwrap.dedent(HOSTILE_CALLS[calls])
    script = f"{script}\nassert refused\n"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr[-2000:]}"
