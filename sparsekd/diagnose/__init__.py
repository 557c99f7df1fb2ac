"""What a model costs and why: coverage, FLOPs, the kernels that run, break-even with dense."""

from sparsekd.diagnose import flops
from sparsekd.diagnose.coverage import coverage
from sparsekd.diagnose.explain import explain
from sparsekd.diagnose.region import Region, region

__all__ = ["Region", "coverage", "explain", "flops", "region"]
