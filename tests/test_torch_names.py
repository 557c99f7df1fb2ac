"""The private names of torch that sparsekd relies on still mean what it takes them for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._vmap_internals import _vmap
from torch.autograd import forward_ad

from sparsekd import _torch


def test_in_transform() -> None:
    assert not _torch.in_transform()
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(_torch.in_transform())
        return x.sum()

    torch.func.vmap(look)(torch.ones(2, 3))
    torch.func.grad(look)(torch.ones(3))
    torch.func.jvp(look, (torch.ones(3),), (torch.ones(3),))
    assert seen == [True] * 3
    assert not _torch.in_transform()


def test_in_forward_ad() -> None:
    assert not _torch.in_forward_ad()
    with forward_ad.dual_level():
        assert _torch.in_forward_ad()
    assert not _torch.in_forward_ad()


def test_transformed_knows_both_kinds_of_batches() -> None:
    x = torch.ones(2, 3)
    assert not _torch.transformed(x)
    seen = []
    for vmap in (torch.func.vmap, _vmap):
        vmap(lambda x: seen.append(_torch.transformed(x)) or x)(x)
    assert seen == [True, True]


def test_without_tangent() -> None:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        assert forward_ad.unpack_dual(_torch.without_tangent(dual)).tangent is None
    assert _torch.without_tangent([1, 2]) == [1, 2]


class Double(torch.autograd.Function):
    """Have no setup_context, without which Function.apply refuses inside a transform."""

    @staticmethod
    def forward(ctx, x):
        assert not torch.is_grad_enabled()
        with _torch.derivatives_of_outer_levels():
            assert torch.is_grad_enabled()
            return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def test_apply_at_this_level() -> None:
    def run(x: Tensor) -> Tensor:
        return _torch.apply_at_this_level(Double, x).sum()

    x = torch.ones(3)
    assert torch.equal(torch.func.grad(run)(x), 2 * x)
    assert not torch._C._functorch.get_single_level_autograd_function_allowed()
