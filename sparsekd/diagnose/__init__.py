"""What a model costs and why: what is sparse, FLOPs, which kernels run, when dense would win."""

from sparsekd.diagnose import flops
from sparsekd.diagnose.coverage import coverage
from sparsekd.diagnose.explain import explain

__all__ = ["coverage", "explain", "flops"]
