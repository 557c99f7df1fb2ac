"""Transforms of torch.func and forward-mode derivatives, against a dense masked weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import (
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    vjp,
    vmap,
)

from sparsekd import Topology, functional, ops

Function = Callable[..., Tensor]
pytestmark = pytest.mark.usefixtures("no_missing_rules")

CASES: dict[str, dict[str, Any]] = {
    "linear": {"weight": (4, 5), "x": (3, 5)},
    "vector": {"weight": (4, 5), "x": (5,)},
    "sequences": {"weight": (4, 5), "x": (2, 3, 5)},
    "no bias": {"weight": (4, 5), "x": (3, 5), "bias": False},
    "conv": {"weight": (4, 2, 3, 2), "x": (3, 2, 4, 5), "padding": (1, 0)},
    "conv of one image": {"weight": (4, 2, 3, 2), "x": (2, 4, 5)},
    "conv without bias": {"weight": (4, 2, 3, 2), "x": (2, 2, 4, 5), "bias": False},
    "grouped": {"weight": (4, 2, 3, 3), "x": (2, 4, 5, 4), "groups": 2, "padding": "same"},
    "depthwise": {"weight": (4, 1, 3, 3), "x": (2, 4, 4, 4), "groups": 4, "padding": 1},
    "strided": {"weight": (4, 2, 3, 2), "x": (2, 2, 6, 5), "stride": (2, 1), "dilation": (1, 2)},
    "reflect": {"weight": (4, 2, 3, 3), "x": (2, 2, 4, 5), "padding": 1, "padding_mode": "reflect"},
    "circular": {
        "weight": (4, 2, 2, 3), "x": (2, 2, 4, 5), "padding": (2, 1), "padding_mode": "circular"
    },
    "channels_last": {"weight": (4, 2, 3, 3), "x": (2, 2, 4, 5), "channels_last": True},
    "full density": {"weight": (4, 2, 3, 3), "x": (2, 2, 4, 5), "density": 1.0},
    "no nonzeros": {"weight": (4, 5), "x": (3, 5), "density": 0.0},
}  # fmt: skip


def double(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Case:
    """A product in sparse form and in dense, as functions of (values, x, bias)."""

    def __init__(self, name: str) -> None:
        options = dict(CASES[name])
        shape, density = options.pop("weight"), options.pop("density", 0.4)
        generator = torch.Generator().manual_seed(5)
        self.topology = Topology.from_mask(torch.rand(shape, generator=generator) < density)
        x = double(*options.pop("x"), seed=1)
        if options.pop("channels_last", False):
            x = x.contiguous(memory_format=torch.channels_last)
        bias = double(shape[0], seed=2) if options.pop("bias", True) else None
        self.flat = self.topology.flat_indices()
        self.args = (double(self.topology.nnz, seed=3), x, bias)
        self.options, self.conv = options, len(shape) == 4

    @property
    def argnums(self) -> tuple[int, ...]:
        return (0, 1) if self.args[2] is None else (0, 1, 2)

    def sparse(self, values: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        run = functional.conv2d if self.conv else functional.linear
        return run(self.topology, values, x, bias, **self.options)

    def dense(self, values: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        flat = torch.zeros(self.topology.numel, dtype=torch.float64)
        weight = flat.scatter(0, self.flat, values).view(self.topology.shape)
        if not self.conv:
            return F.linear(x, weight, bias)
        options = dict(self.options)
        mode = options.pop("padding_mode", "zeros")
        if mode != "zeros":
            sides = functional.resolve_padding(options.pop("padding"), shape_of(weight), [1], [1])
            x = F.pad(x[None] if x.ndim == 3 else x, (*sides[2:], *sides[:2]), mode=mode)
        return F.conv2d(x, weight, bias, **options)


def shape_of(weight: Tensor) -> tuple[int, ...]:
    return tuple(weight.shape[2:])


def scalar(f: Function) -> Function:
    return lambda *args: (f(*args).tanh() * 1.5).square().sum()


def ones_like(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(None if a is None else double(*a.shape, seed=7 + i) for i, a in enumerate(args))


def present(f: Function, case: Case) -> tuple[Function, tuple[Tensor, ...]]:
    """Return `f` as a function of those of the three arguments that are there."""
    args = tuple(a for a in case.args if a is not None)
    return (lambda *a: f(*a, *[None] * (3 - len(a)))), args


def batches(args: tuple[Tensor, ...], dims: tuple[int | None, ...]) -> list[Tensor]:
    return [
        a if d is None else torch.stack([a, a * 2 - 1, a.flip(0)], d % (a.ndim + 1))
        for a, d in zip(args, dims, strict=True)
    ]


def dual(f: Function, args: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(a, t) for a, t in zip(args, tangents, strict=True)]
        return forward_ad.unpack_dual(f(*duals)).tangent


def dual_backward(f: Function, args: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Any:
    """Differentiate forward over reverse with dual numbers, as a Hessian-vector product."""
    with forward_ad.dual_level():
        leaves = [a.clone().requires_grad_() for a in args]
        duals = [forward_ad.make_dual(a, t) for a, t in zip(leaves, tangents, strict=True)]
        grads = torch.autograd.grad(scalar(f)(*duals), duals)
        return [forward_ad.unpack_dual(g).tangent for g in grads]


def batched_vjp(f: Function, args: tuple[Tensor, ...], create_graph: bool = False) -> Any:
    leaves = [a.clone().requires_grad_() for a in args]
    y = f(*leaves)
    vectors = double(3, *y.shape, seed=11).requires_grad_(create_graph)
    grads = torch.autograd.grad(
        y, leaves, vectors, is_grads_batched=True, create_graph=create_graph
    )
    if not create_graph:
        return grads
    total = sum((g * g).sum() for g in grads)
    return torch.autograd.grad(total, [*leaves, vectors], allow_unused=True)


def func_jacobian(f: Function, args: tuple[Tensor, ...], **options: Any) -> Any:
    return torch.autograd.functional.jacobian(f, args, vectorize=True, **options)


def func_hessian(f: Function, args: tuple[Tensor, ...], **options: Any) -> Any:
    return torch.autograd.functional.hessian(scalar(f), args, vectorize=True, **options)


FORWARD = {"strategy": "forward-mode"}
ALL = {1: (0,), 2: (0, 1), 3: (0, 1, 2)}
TRANSFORMS: dict[str, Callable[[Function, tuple[Tensor, ...], tuple[Tensor, ...]], Any]] = {
    "jvp": lambda f, a, t: jvp(f, a, t),
    "jvp of the weight": lambda f, a, t: jvp(lambda v: f(v, *a[1:]), a[:1], t[:1]),
    "jvp of the input": lambda f, a, t: jvp(lambda x: f(a[0], x, *a[2:]), a[1:2], t[1:2]),
    "jvp of the last": lambda f, a, t: jvp(lambda b: f(*a[:-1], b), a[-1:], t[-1:]),
    "jvp of jvp": lambda f, a, t: jvp(lambda *b: jvp(scalar(f), b, t)[1], a, t),
    "dual numbers": dual,
    "dual numbers, backward": dual_backward,
    "linearize": lambda f, a, t: linearize(f, *a)[1](*t),
    "vjp": lambda f, a, t: vjp(f, *a)[1](f(*a).cos()),
    "grad": lambda f, a, t: grad(scalar(f), ALL[len(a)])(*a),
    "grad of grad": lambda f, a, t: grad(
        lambda *b: sum(g.sin().sum() for g in grad(scalar(f), ALL[len(a)])(*b)), ALL[len(a)]
    )(*a),
    "jacrev": lambda f, a, t: jacrev(f, ALL[len(a)])(*a),
    "jacrev in chunks": lambda f, a, t: jacrev(f, ALL[len(a)], chunk_size=2)(*a),
    "jacfwd": lambda f, a, t: jacfwd(f, ALL[len(a)])(*a),
    "hessian": lambda f, a, t: hessian(scalar(f), ALL[len(a)])(*a),
    "jacrev of jacrev": lambda f, a, t: jacrev(jacrev(scalar(f), ALL[len(a)]), ALL[len(a)])(*a),
    "jacrev of jacfwd": lambda f, a, t: jacrev(jacfwd(scalar(f), ALL[len(a)]), ALL[len(a)])(*a),
    "jacfwd of jacfwd": lambda f, a, t: jacfwd(jacfwd(scalar(f), ALL[len(a)]), ALL[len(a)])(*a),
    "jacobian": lambda f, a, t: func_jacobian(f, a),
    "jacobian, create_graph": lambda f, a, t: func_jacobian(f, a, create_graph=True),
    "jacobian, forward": lambda f, a, t: func_jacobian(f, a, **FORWARD),
    "autograd hessian": lambda f, a, t: func_hessian(f, a),
    "autograd hessian, forward": lambda f, a, t: func_hessian(
        f, a, outer_jacobian_strategy="forward-mode"
    ),
    "hvp": lambda f, a, t: torch.autograd.functional.hvp(scalar(f), a, t),
    "vhp": lambda f, a, t: torch.autograd.functional.vhp(scalar(f), a, t),
    "autograd jvp": lambda f, a, t: torch.autograd.functional.jvp(f, a, t),
    "autograd vjp": lambda f, a, t: torch.autograd.functional.vjp(scalar(f), a),
    "batched vjp": lambda f, a, t: batched_vjp(f, a),
    "batched vjp, create_graph": lambda f, a, t: batched_vjp(f, a, create_graph=True),
    "vmap of vjp": lambda f, a, t: vmap(vjp(f, *a)[1])(double(3, *f(*a).shape, seed=12)),
    "vmap of jvp": lambda f, a, t: vmap(lambda *s: jvp(f, a, s)[1])(*batches(t, (0,) * len(a))),
    "vmap of linearize": lambda f, a, t: vmap(linearize(f, *a)[1])(*batches(t, (0,) * len(a))),
}


def assert_equal(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


EVERY = ("linear", "conv", "grouped")  # these go through everything, the others through the core
CORE = ("jvp", "dual numbers", "jacrev", "jacfwd", "hessian", "jacobian", "batched vjp")


@pytest.mark.parametrize(
    "name, transform",
    [(name, t) for name in CASES for t in (TRANSFORMS if name in EVERY else CORE)],
)
def test_transform(name: str, transform: str) -> None:
    case = Case(name)
    results = []
    for f in (case.sparse, case.dense):
        run, args = present(f, case)
        results.append(TRANSFORMS[transform](run, args, ones_like(args)))
    assert_equal(*results)


IN_DIMS: list[tuple[int | None, ...]] = [
    (None, 0, None),
    (None, 1, None),
    (None, -1, None),
    (0, None, None),
    (1, 0, None),
    (0, -1, 0),
    (None, None, 0),
    (None, None, 1),
    (None, 0, 1),
    (0, None, 1),
]
SECOND = ((None, 0, None), (1, 0, None))  # second derivatives as well


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
def test_vmap(name: str, in_dims: tuple[int | None, ...]) -> None:
    case = Case(name)
    _, args = present(case.sparse, case)
    dims = in_dims[: len(args)]
    if all(dim is None for dim in dims):
        pytest.skip("nothing is batched without the bias")
    stacked = batches(args, dims)
    results = []
    for f in (case.sparse, case.dense):
        run, _ = present(f, case)
        numbers = ALL[len(args)]
        mapped = vmap(run, dims, out_dims=-1, randomness="different")
        each = vmap(grad(scalar(run), numbers), dims)(*stacked)
        whole = grad(scalar(vmap(run, dims)), numbers)(*stacked)
        tangent = jvp(vmap(run, dims), tuple(stacked), ones_like(tuple(stacked)))
        results.append([mapped(*stacked), each, whole, tangent])
        if name in EVERY and in_dims in SECOND:
            results[-1].append(vmap(hessian(scalar(run), numbers), dims, chunk_size=2)(*stacked))
    assert_equal(*results)


def test_vmap_of_nothing() -> None:
    for name, sizes in (("linear", (3, 4)), ("conv", (3, 4, 4, 4))):
        case = Case(name)
        for dims in ((None, 0, None), (0, None, None), (0, 0, 0)):
            args = [
                a if d is None else a.new_empty(0, *a.shape)
                for a, d in zip(case.args, dims, strict=True)
            ]
            assert vmap(case.sparse, dims)(*args).shape == (0, *sizes)


@pytest.mark.parametrize("name", ["linear", "vector", "conv", "grouped"])
def test_nested_vmap(name: str) -> None:
    case = Case(name)
    values, x, bias = case.args
    x = batches((x,), (0,))[0]
    values, bias = (torch.stack([a, a + 1]) for a in (values, bias))
    results = []
    for f in (case.sparse, case.dense):
        inner = vmap(f, (None, 0, None))
        models = vmap(inner, (0, None, 0))  # an ensemble on one batch
        crossed = vmap(vmap(f, (0, None, None)), (None, 0, 0))
        results.append((models(values, x, bias), crossed(values, x[:2], bias)))
    assert_equal(*results)


def test_a_compiled_transform() -> None:
    torch._dynamo.reset()
    case = Case("conv")
    results = []
    for f, compiler in ((case.sparse, "aot_eager"), (case.dense, "eager")):
        each = vmap(grad(scalar(f), (0, 1, 2)), (None, 0, None))
        stacked = batches(case.args, (None, 0, None))
        results.append(torch.compile(each, backend=compiler, fullgraph=True)(*stacked))
    assert_equal(*results)


def test_a_functionalized_transform() -> None:
    case = Case("conv")
    traced = torch.fx.experimental.proxy_tensor.make_fx(
        torch.func.functionalize(lambda *a: case.sparse(*a).add_(1))
    )(*case.args)
    assert_equal(traced(*case.args), case.dense(*case.args) + 1)


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_autocast_inside_of_a_transform(name: str) -> None:
    case = Case(name)
    args = tuple(a.float() for a in case.args)
    stacked = batches(args, (None, 0, None))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        each = vmap(grad(lambda *a: case.sparse(*a).float().sum(), (0, 1, 2)), (None, 0, None))
        got = each(*stacked)
    wide = [a.double() for a in stacked]
    expected = vmap(grad(lambda *a: case.dense(*a).sum(), (0, 1, 2)), (None, 0, None))(*wide)
    for actual, exact in zip(got, expected, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), exact, rtol=0.05, atol=0.1)


CONV = ([4, 2, 3, 2], [2, 1], [1, 1, 0, 1], [1, 1], 2)
X, Y = (1, 4, 3, 3), (1, 4, 2, 3)
PRODUCTS: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None, list[Any], list[Any]]] = {
    # shapes of the two factors, None for values; what follows the structure
    "conv2d": (X, None, [True], list(CONV)),
    "conv2d_dgrad": (Y, None, [list(X)], list(CONV)),
    "conv2d_wgrad": (Y, X, [], list(CONV)),
    "linear": ((3, 24), None, [True], [[4, 24]]),
    "linear_dgrad": ((3, 4), None, [], [[4, 24]]),
    "linear_wgrad": ((3, 4), (3, 24), [], [[4, 24]]),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_product_has_every_derivative(backend: str, name: str) -> None:
    left, right, fifth, rest = PRODUCTS[name]
    generator = torch.Generator().manual_seed(2)
    shape = CONV[0] if name.startswith("conv") else [4, 24]
    topology = Topology.from_mask(torch.rand(shape, generator=generator) < 0.3)
    factors = [double(*left, seed=1), double(*(right or (topology.nnz,)), seed=2)]
    if fifth == [True]:
        factors.append(double(4, seed=3))
        fifth = []
    structure = topology.crow_indices, topology.col_indices

    def run(*factors: Tensor) -> Tensor:
        return getattr(ops, name)(*factors[:2], *structure, *factors[2:], *fifth, *rest)

    inputs = [f.requires_grad_() for f in factors]
    assert torch.autograd.gradcheck(
        run, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(
        run, inputs, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True
    )


def test_a_tensor_that_has_left_its_transform() -> None:
    case = Case("linear")
    left = []

    def keep(x: Tensor) -> Tensor:
        left.append(x)
        return x.sum()

    values, x, bias = case.args
    leaf = x.clone().requires_grad_()
    grad(keep)(leaf)
    y = case.sparse(values, left[0], bias)
    assert_equal(y.detach(), case.dense(*case.args))
    assert_equal(
        torch.autograd.grad(scalar(case.sparse)(values, left[0], bias), leaf),
        torch.autograd.grad(scalar(case.dense)(values, leaf, bias), leaf),
    )
