"""What `count_step.py` counts of small layers."""

from __future__ import annotations

import shutil

import pytest

pytest.importorskip("sparsekd._C", reason="the compiled module is not built")

from count_step import count


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_a_step_of_convolutions() -> None:
    ops = count("resnet", "cuda", sparsity=0.9, channels=16, batch=8)
    launches = {(op.name, op.launches) for op in ops}
    # Space for the result and to work in, and the library.
    assert {op.calls for op in ops} == {3}
    # Packing, product and unpacking; the weight gradient packs twice and adds up parts.
    assert launches == {("conv2d", 3), ("conv2d_dgrad", 3), ("conv2d_wgrad", 4)}
    for op in ops:
        assert op.counts.flops > 0
        assert op.memory > op.least * 0.9
        assert op.counts.read >= op.counts.read_once
