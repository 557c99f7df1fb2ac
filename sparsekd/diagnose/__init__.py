"""What a model costs and why: which kernels run, when dense would win, FLOPs, a machine's roofs."""

from sparsekd.diagnose import flops
from sparsekd.diagnose.coverage import coverage
from sparsekd.diagnose.explain import explain

__all__ = ["coverage", "explain", "flops"]
