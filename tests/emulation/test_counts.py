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
    # Space for the result, for a weight gradient to sum up in, and the library.
    assert {op.calls - (op.name == "conv2d_wgrad") for op in ops} == {2}
    assert launches == {("conv2d", 1), ("conv2d_dgrad", 1), ("conv2d_wgrad", 2)}
    for op in ops:
        assert op.counts.flops > 0
        assert 0.7 * op.least < op.memory < 1.3 * op.least
        assert op.counts.read >= op.counts.read_once
