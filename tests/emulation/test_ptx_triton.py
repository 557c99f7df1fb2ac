"""Triton kernels run on CPU tensors as the PTX that they compile to; mistakes are found."""

from __future__ import annotations

import pytest
import torch

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


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("warps", [1, 4])
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
