"""Other packages that train with sparse weights on a CPU, where they are installed.

`pip install sparsekd[bench]` brings them. Each is used as its own documentation says, with
contiguous float32 tensors, on our masks.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import map_shapes
from sparsekd.bench.cases import LayerCase, ModelCase
from sparsekd.bench.steps import StepProblem, StepRun, train
from sparsekd.nn import sparse_modules

Layer = tuple[Callable[[Tensor], Tensor], Tensor, Tensor]
"""Forward pass, trainable nonzeros, and where those of the dense weight are, row by row."""


def _not_installed(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed; `pip install sparsekd[bench]` brings it"
    return None


def sparseprop_missing(case: LayerCase | ModelCase) -> str | None:
    """Return why SparseProp cannot run here, None if it can."""
    return _not_installed("sparseprop")


def sparselab_missing(case: LayerCase) -> str | None:
    """Return why sparselab cannot run a layer here, None if it can."""
    if case.kind == "conv":
        return "sparselab has no convolution"
    return _not_installed("sparselab")


def sparseprop(
    weight: Tensor,
    x: Tensor,
    grad: Tensor,
    stride: int,
    padding: int,
    bias: nn.Parameter | None = None,
) -> Layer:
    """Build SparseProp's layer, a convolution in the faster of its two modes.

    Source: Nikdan et al., SparseProp (2023), https://github.com/IST-DASLab/sparseprop.
    """
    modules: Any = importlib.import_module("sparseprop.modules")
    if weight.ndim == 2:
        layers = [modules.SparseLinear(weight, bias)]
    else:
        layers = [
            modules.SparseConv2d(weight, bias, padding, stride, vectorizing_over_on=mode)
            for mode in (False, True)
        ]
    best = layers[0] if len(layers) == 1 else _faster(layers, x, grad)
    return best, best.W_val, torch.arange(len(best.W_val))


def _faster(layers: list[Any], x: Tensor, grad: Tensor) -> Any:
    def seconds(layer: Any) -> float:
        start = time.perf_counter()
        torch.autograd.grad(layer(x), (x, layer.W_val), grad)
        return time.perf_counter() - start

    return min(layers, key=seconds)


def sparselab(weight: Tensor, x: Tensor, grad: Tensor, stride: int, padding: int) -> Layer:
    """Build sparselab's linear layer with our nonzeros.

    Source: sparselab 0.2, sparselab/nn.py.
    """
    package: Any = importlib.import_module("sparselab")
    layer = package.SparseLinear(weight.shape[1], weight.shape[0], bias=False)
    layer._csr = package.PaddedCSR.from_dense(weight)
    layer._values = nn.Parameter(torch.from_numpy(layer._csr.values))
    slots = [
        torch.arange(start, start + count)
        for start, count in zip(layer._csr.row_start, layer._csr.row_nnz, strict=False)
    ]
    return layer, layer._values, torch.cat(slots)


def sparseprop_model(model: nn.Module, x: Tensor) -> nn.Module:
    """Replace the sparse layers of a model by SparseProp's, convolutions in their faster mode.

    Args:
        model: with layers of sparsekd; changed in place.
        x: a batch of its input.

    Returns:
        The model.
    """
    for name, (given, result) in map_shapes(model, dict(sparse_modules(model)), x).items():
        parent, _, child = name.rpartition(".")
        sparse: Any = model.get_submodule(name)
        stride, padding = (sparse.stride[0], sparse.padding[0]) if len(given) == 4 else (1, 0)
        weight = sparse.dense_weight().detach()
        x_like, grad = torch.randn(given).requires_grad_(), torch.randn(result)
        layer, *_ = sparseprop(weight, x_like, grad, stride, padding, sparse.bias)
        model.get_submodule(parent).add_module(child, layer)  # type: ignore[arg-type]
    return model


def sparseprop_step(problem: StepProblem) -> StepRun:
    """Prepare training steps with SparseProp's layers."""
    model = sparseprop_model(copy.deepcopy(problem.model), problem.x)
    return train(model, problem, torch.contiguous_format)


def versions() -> dict[str, str | None]:
    """Return the installed version of each package, None for those that are not."""
    return {name: _version(name) for name in ("sparseprop", "sparselab")}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
