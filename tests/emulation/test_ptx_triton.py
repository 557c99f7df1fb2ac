"""Triton kernels run on CPU tensors as the PTX that they compile to; mistakes are found."""

from __future__ import annotations

import pytest
import torch
from ptx_machine import OutOfBounds

triton = pytest.importorskip("triton", reason="needs Triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def product_kernel(
    a, b, c, n, stride, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):
    """c = a @ b, a [M, n], b [n, N] with rows ``stride`` apart; programs take M rows each."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.arange(0, N)
    total = tl.zeros((M, N), tl.float32)
    for first in range(0, n, K):
        k = first + tl.arange(0, K)
        left = tl.load(a + row[:, None] * n + k, mask=k < n, other=0.0)
        right = tl.load(b + k[:, None] * stride + column, mask=k[:, None] < n, other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    tl.store(c + row[:, None] * N + column, total.to(c.dtype.element_ty))


def product(dtype: torch.dtype, n: int, precision: str = "ieee", **options: int):
    generator = torch.Generator().manual_seed(n)
    a = torch.randn(64, n, generator=generator).to(dtype)
    b = torch.randn(n, 32, generator=generator).to(dtype)
    c = torch.full((64, 32), torch.nan, dtype=dtype)
    product_kernel[(2,)](a, b, c, n, b.stride(0), 32, 32, 32, precision, **options)
    exact = a.double() @ b.double()
    scale = a.double().abs() @ b.double().abs()
    return ((c.double() - exact).abs() / scale).max().item()


@pytest.mark.parametrize("warps, stages", [(1, 1), (4, 1), (4, 3)])
@pytest.mark.parametrize("n", [32, 100])
@pytest.mark.parametrize(
    "dtype, precision",
    [
        (torch.float32, "ieee"),
        (torch.float32, "tf32"),
        (torch.float16, "ieee"),
        (torch.bfloat16, "ieee"),
    ],
    ids=str,
)
def test_products_of_tensor_cores(ptx, dtype, precision, n, warps, stages) -> None:
    error = product(dtype, n, precision, num_warps=warps, num_stages=stages)
    eps = 2.0**-10 if precision == "tf32" else torch.finfo(dtype).eps
    assert error < 2 * eps
    if precision == "tf32":
        assert error > 1e-6, "TF32 is less precise, which has to be seen"
    assert ptx.launches[-1].grid == (2, 1, 1)


@triton.jit
def scale_kernel(x, y, factor, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n) * factor, mask=i < n)


@pytest.mark.parametrize("n", [1, 16, 100])  # a constant, divisible by 16, neither
@pytest.mark.parametrize("offset", [0, 1])  # an address that is aligned, and one that is not
def test_arguments_are_specialised(ptx, n: int, offset: int) -> None:
    x, y = torch.arange(200.0)[offset:], torch.zeros(200)[offset:]
    grid = lambda meta: (triton.cdiv(n, meta["BLOCK"]),)  # noqa: E731
    scale_kernel[grid](x, y, 0.5, n, BLOCK=32)
    assert torch.equal(y[:n], x[:n] / 2)
    assert not y[n:].any()
    assert ptx.launches[-1].grid == (triton.cdiv(n, 32), 1, 1)


def test_configurations_are_tried(ptx) -> None:
    configs = [triton.Config({"BLOCK": block}, num_warps=2) for block in (32, 64)]
    tuned = triton.autotune(configs, key=["n"])(triton.JITFunction(scale_kernel.fn))
    x, y = torch.arange(100.0), torch.zeros(100)
    tuned[lambda meta: (triton.cdiv(100, meta["BLOCK"]),)](x, y, 3.0, 100)
    assert torch.equal(y, 3 * x)
    assert {launch.grid[0] for launch in ptx.launches} == {2, 4}


def test_too_much_shared_memory_is_refused(ptx) -> None:
    x = torch.zeros(128, 1024, dtype=torch.float16)
    with pytest.raises(triton.runtime.errors.OutOfResources, match="shared memory"):
        product_kernel[(1,)](x, x, x, 1024, 128, 128, 128, 128, "ieee", num_stages=4)
    assert not ptx.launches


def test_memory_of_no_argument_is_out_of_bounds(ptx) -> None:
    x, y = torch.zeros(64), torch.zeros(63)
    with pytest.raises(OutOfBounds, match=r"\(\+252 bytes from the start of .* of 252 bytes"):
        scale_kernel[(1,)](x, y, 1.0, 64, BLOCK=64)
