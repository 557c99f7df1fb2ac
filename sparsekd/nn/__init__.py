"""Drop-in weight-sparse modules, and the way there from a dense model and back."""

from __future__ import annotations

from sparsekd.nn import init
from sparsekd.nn.base import SparseModule, sparse_modules
from sparsekd.nn.conv import SparseConv2d
from sparsekd.nn.conv1d import SparseConv1D
from sparsekd.nn.convert import densify, relayout, sparsify
from sparsekd.nn.cuda_graphs import make_capturable
from sparsekd.nn.distributed import keep_indices_local
from sparsekd.nn.fuse import optimize, unfuse
from sparsekd.nn.linear import SparseLinear
from sparsekd.sparsity import Survey, survey

__all__ = [
    "SparseConv1D",
    "SparseConv2d",
    "SparseLinear",
    "SparseModule",
    "Survey",
    "densify",
    "init",
    "keep_indices_local",
    "make_capturable",
    "optimize",
    "relayout",
    "sparse_modules",
    "sparsify",
    "survey",
    "unfuse",
]
