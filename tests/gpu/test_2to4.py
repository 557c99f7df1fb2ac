"""The backend "semi_structured" on a GPU: torch's own kernels, not what decodes their operands.

Run by `make gpu-check`, before the other tests of this folder.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from semi_structured_kernels import mask_2to4, transposable_mask
from torch import Tensor, nn

import sparsekd as skd
from sparsekd.ops.dispatch.decisions import decide
from sparsekd.testing import available_backends, poisoned_memory, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEVICE = "cuda"
DTYPES = (torch.float16, torch.bfloat16)
NAME = "semi_structured"


@pytest.fixture(autouse=True)
def on_semi_structured() -> Iterator[None]:
    if NAME not in available_backends():
        pytest.skip(f"backend {NAME}: {skd.ops.info()['backends'][NAME]}")
    with skd.backend(NAME):
        yield


def run(op: str, *args: Any) -> Tensor:
    """Return the result of an op, which the backend must run itself."""
    assert decide(op, args).backend == NAME
    return getattr(skd.ops, op)(*args)


def tensors(shape: tuple[int, int], rows: int, dtype: torch.dtype) -> list[Tensor]:
    """Return a dense float64 weight, its values and indices, inputs, output gradients, a bias."""
    mask = transposable_mask(*shape)
    topology = skd.Topology.from_mask(mask)
    values, x, grad, bias = (
        torch.randn(size).to(dtype)
        for size in ((topology.nnz,), (rows, shape[1]), (rows, shape[0]), (shape[0],))
    )
    dense = torch.zeros(shape, dtype=torch.float64)
    dense[mask] = values.double()
    given = values, topology.crow_indices, topology.col_indices, x, grad, bias
    return [dense, *(tensor.to(DEVICE) for tensor in given)]


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert relative_error(found.cpu(), expected) < torch.finfo(found.dtype).eps


@pytest.mark.parametrize("rows", [1, 8, 37, 1024])
@pytest.mark.parametrize("shape", [(64, 64), (192, 128), (1024, 2048), (4096, 1024)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_equal_masked_dense(dtype, shape: tuple[int, int], rows: int) -> None:
    dense, *weight, x, grad, bias = tensors(shape, rows, dtype)
    oracle = x.cpu().double() @ dense.t()
    with poisoned_memory():
        assert_close(run("linear", x, *weight, None, list(shape)), oracle)
        assert_close(run("linear", x, *weight, bias, list(shape)), oracle + bias.cpu().double())
        dx = run("linear_dgrad", grad, *weight, list(shape))
    assert_close(dx, grad.cpu().double() @ dense)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_1x1_convolutions_equal_masked_dense(dtype: torch.dtype) -> None:
    dense, *weight, x, grad, bias = tensors((128, 64), 3 * 5 * 7, dtype)
    shape, point = [128, 64, 1, 1], ([1, 1], [0, 0, 0, 0], [1, 1], 1)
    maps, upper = (rows.view(3, 5, 7, -1).permute(0, 3, 1, 2) for rows in (x, grad))
    y = run("conv2d", maps, *weight, bias, shape, *point)
    dx = run("conv2d_dgrad", upper, *weight, [3, 64, 5, 7], shape, *point)
    assert_close(y.permute(0, 2, 3, 1).flatten(0, 2), x.cpu().double() @ dense.t() + bias.cpu())
    assert_close(dx.permute(0, 2, 3, 1).flatten(0, 2), grad.cpu().double() @ dense)


def test_metadata_selects_what_is_multiplied() -> None:
    """Infinite inputs do not reach outputs that have no weight for them."""
    _, *weight, x, _, _ = tensors((64, 64), 8, torch.float16)
    connected = transposable_mask(64, 64)[:, 7]
    x[1, 7] = float("inf")
    y = run("linear", x, *weight, None, [64, 64]).cpu()
    assert torch.equal(y[1].isfinite(), ~connected)
    assert y[[0, *range(2, 8)]].isfinite().all()


def test_a_recorded_step_goes_on_after_a_rewire_and_waits_for_nothing() -> None:
    torch.manual_seed(0)
    layers = [
        skd.nn.SparseLinear(64, 64, mask=mask_2to4(64, 64, seed), layout="nm") for seed in (1, 2)
    ]
    model = skd.make_capturable(nn.Sequential(*layers).to(DEVICE, torch.float16))
    x = torch.randn(19, 64, device=DEVICE, dtype=torch.float16)

    def step() -> Tensor:
        model.zero_grad(set_to_none=False)
        loss = model(x).float().square().mean()
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for seed in range(3, 6):
        for layer in layers:
            layer.rewire(mask_2to4(64, 64, seed))
        graph.replay()
        expected = copy.deepcopy(model)(x).float().square().mean()
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)
