"""The dense backend: what it keeps of the sparse one beyond its results."""

from __future__ import annotations

import pytest
import torch

import sparsekd as skd
from sparsekd.nn import SparseLinear

pytest.importorskip("sparsekd._C", reason="the compiled module is not built")


def test_a_backward_pass_inside_autocast_keeps_its_precision() -> None:
    fully = SparseLinear(64, 64, sparsity=0.5)
    x = torch.randn(16, 64, requires_grad=True)
    grads = []
    for name in ("cpp", "dense"):
        with skd.backend(name):
            y = fully(x).square().sum()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                grads.append(torch.autograd.grad(y, [x, fully.values]))
    for a, b in zip(*grads, strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
