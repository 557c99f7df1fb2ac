"""A convolution on maps in the blocked layout, as between the layers of a network."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from sparsekd.bench.cases import LayerCase
from sparsekd.bench.layers import RESULTS, LayerProblem, LayerRun, sparse_layer
from sparsekd.nn.blocked import spec_of
from sparsekd.ops.cpu import blocked, preactivation
from sparsekd.ops.cpu.blocked_map import AVAILABLE, enter
from sparsekd.ops.cpu.blocked_ordinary import left


def layer(problem: LayerProblem) -> LayerRun:
    """Prepare forward and backward of a layer; ways into the layout and out of it are not timed."""
    sparse = sparse_layer(problem)
    kind = partial(preactivation.PreActivationPlan, False)
    n, c, h, w = problem.case.input_shape
    plan = blocked.plan(kind, sparse, [spec_of(sparse, False)], None, False, (n, c, h, w))
    assert plan is not None, "the kernels take any layer of the arena"
    block = preactivation.Block(plan, None, [], sparse.values, None, _differentiated_once)
    maps = problem.inputs(torch.channels_last, torch.float32)
    with torch.no_grad():
        x, grad = map(enter, maps)
    x.tensor.requires_grad_()
    shapes = {"output": grad.shape, "input gradient": x.shape}

    def call() -> tuple[Tensor, ...]:
        y = preactivation.run(block, x, moments=False)
        assert y is not None, "the arena's maps are finite"
        return (y.tensor, *torch.autograd.grad(y.tensor, (x.tensor, sparse.values), grad.tensor))

    def plain(name: str, result: Tensor) -> Tensor:
        return left(result, shapes[name]) if name in shapes else result

    return LayerRun(call, RESULTS, lambda gradient: gradient, plain)


def missing(case: LayerCase) -> str | None:
    """Return why a layer is not timed in the layout."""
    if case.kind == "linear":
        return "the blocked layout is for maps"
    return None if AVAILABLE else "the compiled module is not built"


def _differentiated_once(*_: object) -> Tensor:
    raise AssertionError("the arena takes no second derivatives")
