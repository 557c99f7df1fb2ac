"""BatchNorm with residual and ReLU as one op equals the three in plain torch, on every backend."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsekd import ops
from sparsekd.errors import ShapeError, UnsupportedError
from sparsekd.testing import poisoned_memory

EPS = 1e-5
LAYOUTS = (torch.contiguous_format, torch.channels_last)
SHAPES = [(2, 3, 5, 7), (8, 64, 4, 4), (5, 24, 7, 7), (4, 17, 1, 1), (1, 5, 3, 3), (3, 300, 2, 3)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, *, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    channels = shape[1]
    return {
        "x": draw(*shape),
        "residual": draw(*shape),
        "weight": draw(channels),
        "bias": draw(channels),
        "mean": draw(channels),
        "var": draw(channels).square() + 0.1,
        "grad": draw(*shape),
    }


def plain(given: dict[str, Tensor | None], relu: bool, frozen: bool) -> Tensor:
    mean, var = (given["mean"], given["var"]) if frozen else (None, None)
    x = given["x"]
    assert x is not None
    y = F.batch_norm(x, mean, var, given["weight"], given["bias"], not frozen, 0.0, EPS)
    if given["residual"] is not None:
        y = y + given["residual"]
    return y.relu() if relu else y


def fused(given: dict[str, Tensor | None], relu: bool, frozen: bool) -> Tensor:
    x, mean, var = (given[name] for name in ("x", "mean", "var"))
    assert x is not None
    if not frozen:
        mean, var = ops.batch_moments(x)
    around = [given[name] for name in ("residual", "weight", "bias")]
    return ops.norm_act(x, *around, mean, var, EPS, relu, frozen)


def batch_norm(x: Tensor, relu: bool) -> Tensor:
    return ops.norm_act(x, None, None, None, *ops.batch_moments(x), EPS, relu, False)


def results(call, given: dict[str, Tensor | None], relu: bool, frozen: bool) -> list[Tensor]:  # type: ignore[no-untyped-def]
    leaves = {
        name: value.detach().requires_grad_(name in ("x", "residual", "weight", "bias"))
        for name, value in given.items()
        if value is not None
    }
    y = call({name: leaves.get(name) for name in given}, relu, frozen)
    y.backward(leaves["grad"].detach())
    return [y.detach(), *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_plain_torch(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    torch.set_num_threads(2)
    for number, choice in enumerate(itertools.product([False, True], repeat=4)):
        relu, frozen, added, affine = choice
        given: dict[str, Tensor | None] = dict(inputs(shape, dtype, seed=number))
        if not added:
            given["residual"] = None
        if not affine:
            given["weight"] = given["bias"] = None
        for name in ("x", "residual", "grad"):
            if (value := given[name]) is not None:
                given[name] = value.contiguous(memory_format=layout)
        exact = {name: None if v is None else v.double() for name, v in given.items()}
        with poisoned_memory():
            actual = results(fused, given, relu, frozen)
        for one, other in zip(actual, results(plain, exact, relu, frozen), strict=True):
            # sums over the batch, divided by deviations that may be small
            limit = 64 * torch.finfo(dtype).eps * (1 + other.abs().max().item())
            assert (one - other).abs().max() <= limit * exact["x"][:, 0].numel() ** 0.5  # type: ignore[index]
        if min(shape[1:3]) > 1:
            assert actual[0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
def test_moments_keep_their_accuracy_far_from_zero(
    backend: str, layout: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 20, 15, 15, generator=generator).add_(1e4)
    x[:4] += 100  # no centre fits the whole batch
    mean, var = ops.batch_moments(x.contiguous(memory_format=layout))
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), exact_var, rtol=2e-6, atol=0)


def test_maps_larger_than_the_caches() -> None:
    given: dict[str, Tensor | None] = dict(inputs((20, 48, 72, 72), torch.float32))
    torch.set_num_threads(2)
    for layout in LAYOUTS:
        for name in ("x", "residual", "grad"):
            given[name] = given[name].contiguous(memory_format=layout)  # type: ignore[union-attr]
        first, again = results(fused, given, True, False), results(fused, given, True, False)
        for one, other, same in zip(first, results(plain, given, True, False), again, strict=True):
            assert torch.equal(one, same)
            # a few of five million values change side of the ReLU
            assert (one - other).norm() < 1e-3 * other.norm()


def test_operands_of_another_layout_and_overlapping_ones(backend: str) -> None:
    given = inputs((3, 6, 4, 5), torch.float64)
    want = results(plain, given, True, False)
    changed = dict(given)
    changed["x"] = given["x"].contiguous(memory_format=torch.channels_last)
    changed["residual"] = given["residual"].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for one, other in zip(results(fused, changed, True, False), want, strict=True):
        torch.testing.assert_close(one, other)
    x = given["x"].requires_grad_()
    y = batch_norm(x, True)
    y.mean().backward()  # an expanded gradient
    z = F.batch_norm(x, None, None, None, None, True, 0.0, EPS).relu()
    torch.testing.assert_close(x.grad, torch.autograd.grad(z.mean(), x)[0])


def test_nan_passes_the_relu(backend: str) -> None:
    x = torch.randn(2, 2, 3, 3)
    x[0, 0, 0, 0] = torch.nan
    y, mean = batch_norm(x, True), ops.batch_moments(x)[0]
    assert y[:, 0].isnan().all()
    assert not y[:, 1].isnan().any()
    assert mean[0].isnan()


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_gradcheck(backend: str, relu: bool, frozen: bool, added: bool) -> None:
    given = inputs((2, 3, 2, 3), torch.float64, seed=3)
    names = [n for n in ("x", "residual", "weight", "bias") if added or n != "residual"]

    def run(*leaves: Tensor) -> Tensor:
        return fused(
            {**given, "residual": None, **dict(zip(names, leaves, strict=True))}, relu, frozen
        )

    leaves = [given[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
def test_opcheck(backend: str, layout: torch.memory_format) -> None:
    given = inputs((2, 3, 4, 5), torch.float32)
    x, residual, grad = (
        given[name].contiguous(memory_format=layout) for name in ("x", "residual", "grad")
    )
    weight, bias, mean, var = (given[name] for name in ("weight", "bias", "mean", "var"))
    for tensor in (x, residual, weight, bias):
        tensor.requires_grad_()
    torch.library.opcheck(ops.batch_moments, (x,))
    for frozen in (False, True):
        torch.library.opcheck(
            ops.norm_act, (x, residual, weight, bias, mean, var, EPS, True, frozen)
        )
        torch.library.opcheck(ops.norm_act, (x, None, None, None, mean, var, EPS, False, frozen))
    leaves = [t.detach() for t in (grad, x, residual, weight, bias, mean, var)]
    torch.library.opcheck(ops.norm_act_backward, (*leaves, EPS, True, False, True))
    leaves[2] = None
    torch.library.opcheck(ops.norm_act_backward, (*leaves, EPS, True, True, False))


def test_empty_batch(backend: str) -> None:
    x = torch.empty(0, 3, 4, 4, requires_grad=True)
    y = ops.norm_act(x, None, None, None, torch.zeros(3), torch.ones(3), EPS, True, True)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape


def test_refusals(backend: str) -> None:
    x, mean, var = torch.ones(2, 3, 4, 4), torch.ones(3), torch.ones(3)

    def call(x: Tensor, residual: Tensor | None = None, **changed: Tensor) -> None:
        own = {"weight": None, "bias": None, "mean": mean, "var": var, **changed}
        ops.norm_act(x, residual, *own.values(), EPS, True, False)

    with pytest.raises(ShapeError, match="N, C, H, W"):
        call(x[0])
    with pytest.raises(ShapeError, match="N, C, H, W"):
        ops.batch_moments(x[0])
    with pytest.raises(ShapeError, match="residual"):
        call(x, x[:1])
    with pytest.raises(ShapeError, match="weight"):
        call(x, weight=torch.ones(4))
    with pytest.raises(UnsupportedError, match="bias"):
        call(x, bias=torch.ones(3, dtype=torch.float64))
    with pytest.raises(UnsupportedError, match="float32 or float64"):
        call(x.bfloat16())
    with pytest.raises(ShapeError, match="mask"):
        ops.norm_act_backward(x, x, x, None, None, mean, var, EPS, False, False, True)
    with pytest.raises(ShapeError, match="param_grads"):
        ops.norm_act_backward(x, x, None, None, None, mean, var, EPS, False, False, False)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    compiled = pytest.importorskip("sparsekd._C")
    if isa not in compiled.info()["isas"]:
        pytest.skip(f"this processor has no {isa}")
    given: dict[str, Tensor | None] = dict(inputs((3, 21, 5, 5), torch.float64))
    compiled.set_isa(isa)
    try:
        actual = results(fused, given, True, False)
    finally:
        compiled.set_isa("auto")
    for one, other in zip(actual, results(plain, given, True, False), strict=True):
        torch.testing.assert_close(one, other)
