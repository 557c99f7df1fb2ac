"""Drop-in weight-sparse modules, and conversion of dense models to them and back."""

from __future__ import annotations

from sparsekd.nn import init
from sparsekd.nn.base import SparseModule, sparse_modules
from sparsekd.nn.conv import SparseConv1d, SparseConv2d
from sparsekd.nn.conv1d import SparseConv1D
from sparsekd.nn.convert import densify, relayout, sparsify
from sparsekd.nn.cuda_graphs import make_capturable
from sparsekd.nn.distributed import keep_indices_local
from sparsekd.nn.fused import register_fused
from sparsekd.nn.linear import SparseLinear
from sparsekd.nn.norm_act import FusedBatchNormAct2d, conv_norm_act, norm_act
from sparsekd.nn.optimize import FusedNorms, fused_norms, optimize, unfuse
from sparsekd.nn.state import stored_masks
from sparsekd.sparsity import Survey, survey
from sparsekd.sparsity.attention import SplitAttention
from sparsekd.sparsity.experts import SplitExperts

__all__ = [
    "FusedBatchNormAct2d",
    "FusedNorms",
    "SparseConv1D",
    "SparseConv1d",
    "SparseConv2d",
    "SparseLinear",
    "SparseModule",
    "SplitAttention",
    "SplitExperts",
    "Survey",
    "conv_norm_act",
    "densify",
    "fused_norms",
    "init",
    "keep_indices_local",
    "make_capturable",
    "norm_act",
    "optimize",
    "register_fused",
    "relayout",
    "sparse_modules",
    "sparsify",
    "stored_masks",
    "survey",
    "unfuse",
]
