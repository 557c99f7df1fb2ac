"""The private names of torch that sparsekd relies on still mean what it takes them for."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._vmap_internals import _vmap
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from sparsekd import _torch


def test_every_name_has_a_test() -> None:
    """Here, or in the file beside for modules."""
    nodes = ast.parse(Path(_torch.__file__).read_text()).body
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    for node in nodes:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            names.add(ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target))
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname for alias in node.names if alias.asname}
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_torch_names*.py"))
    assert not {n for n in names if not n.startswith("_") and f"_torch.{n}" not in tests}


# -- transforms of torch.func, forward-mode differentiation ----------------------------------------


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


class Double(_torch.OneLevelFunction):
    """Twice a tensor; without setup_context, so `apply` refuses it inside a transform."""

    running: list[object] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx, x):
        assert not torch.is_grad_enabled()
        with _torch.derivatives_of_outer_levels():
            assert torch.is_grad_enabled()
            return x * 2

    @staticmethod
    def backward(ctx, grad):
        Double.running.append(_torch.running_function())
        return grad * 2


def test_apply_at_this_level_and_derivatives_of_outer_levels() -> None:
    def run(x: Tensor) -> Tensor:
        return _torch.apply_at_this_level(Double, x).sum()

    x = torch.ones(3)
    assert torch.equal(torch.func.grad(run)(x), 2 * x)
    assert not torch._C._functorch.get_single_level_autograd_function_allowed()


class Triple(_torch.OneLevelFunction):
    """Three times a tensor."""

    @staticmethod
    def forward(ctx, x, other):
        return x * 3

    @staticmethod
    def backward(ctx, grad):
        return grad * 3, None


def test_OneLevelFunction_is_a_Function() -> None:
    x = torch.ones(3, requires_grad=True)
    y = Triple.apply(x, None)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((3,), 3.0))
    assert type(y.grad_fn).__name__ == "TripleBackward"


def test_wrapped_tells_tensors_of_transforms_even_afterwards() -> None:
    kept: list[Tensor] = []
    x = torch.ones(3)

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        assert _torch.wrapped(x)
        return x.sum()

    torch.func.grad(keep)(x)
    assert _torch.wrapped(kept[0])
    assert not _torch.wrapped(x)
    assert not _torch.wrapped(torch.nn.Parameter(x))


# -- the dispatcher --------------------------------------------------------------------------------


class Shouting(Tensor):
    """A subclass whose every call would raise."""

    @classmethod
    def __torch_function__(cls, *args, **kwargs):
        raise AssertionError("called")

    __torch_dispatch__ = __torch_function__


def test_intercepted_knows_modes() -> None:
    assert not _torch.intercepted()
    with torch.device("meta"):  # a mode of functions
        assert _torch.intercepted()
    with FlopCounterMode(display=False):  # a mode of the dispatcher
        assert _torch.intercepted()
    assert not _torch.intercepted()


def test_profiled() -> None:
    assert not _torch.profiled()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert _torch.profiled()
        assert not _torch.intercepted()
    assert not _torch.profiled()


def test_has_global_hook() -> None:
    assert not _torch.has_global_hook()
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    assert _torch.has_global_hook()
    handle.remove()
    assert not _torch.has_global_hook()


def test_jit_trace() -> None:
    assert _torch.jit_trace() is None
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(_torch.jit_trace() is not None)
        return x + 1

    torch.jit.trace(look, torch.ones(2), check_trace=False)
    assert seen == [True]
    assert _torch.jit_trace() is None


def test_below_autograd_records_nothing() -> None:
    x = torch.ones(2, requires_grad=True)
    with _torch.below_autograd():
        assert (x * 2).grad_fn is None
    assert (x * 2).grad_fn is not None


def test_after_autograd_leads_from_an_autograd_kernel_to_the_next() -> None:
    library = torch.library.Library("sparsekd_test_names", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    seen = []

    def autograd(keyset: _torch.KeySet, x: Tensor) -> Tensor:
        seen.append("autograd")
        with _torch.below_autograd():
            op = torch.ops.sparsekd_test_names.twice.default
            return op.redispatch(keyset & _torch.after_autograd, x)

    def cpu(x: Tensor) -> Tensor:
        seen.append("cpu")
        return x * 2

    library.impl("twice", autograd, "Autograd", with_keyset=True)
    library.impl("twice", cpu, "CPU")
    x = torch.ones(2, requires_grad=True)
    assert torch.equal(torch.ops.sparsekd_test_names.twice(x), 2 * x)
    assert seen == ["autograd", "cpu"]


def test_without_autocast() -> None:
    a = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        with _torch.without_autocast("cpu")():
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16
    _torch.without_autocast("cuda")


def test_plain_tensors_and_wrapper_tensor() -> None:
    made = _torch.wrapper_tensor(Shouting, (2, 3), dtype=torch.float16, device="meta")
    with pytest.raises(AssertionError, match="called"):
        _ = made.shape
    with _torch.plain_tensors():
        assert (type(made), made.shape, made.dtype) == (Shouting, (2, 3), torch.float16)


def test_map_only() -> None:
    x = torch.ones(2)
    found = _torch.map_only(Tensor, Tensor.neg, {"a": (x, 3), "b": [None, x]})
    assert torch.equal(found["a"][0], -x)
    assert torch.equal(found["b"][1], -x)
    assert (found["a"][1], found["b"][0]) == (3, None)


def test_DispatchMode_sees_ops() -> None:
    class Names(_torch.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    with Names():
        torch.ones(2).relu()
    assert seen == ["aten::ones", "aten::relu"]


# -- backward passes -------------------------------------------------------------------------------


def test_current_pass_and_at_end_of_pass() -> None:
    assert _torch.current_pass() == -1
    seen: list[int | str] = []

    def hook(grad: Tensor) -> None:
        seen.append(_torch.current_pass())
        _torch.at_end_of_pass(lambda: seen.append("end"))

    x = torch.ones(2, requires_grad=True)
    x.register_hook(hook)
    y = x * 2
    y.register_hook(lambda grad: seen.append(_torch.current_pass()))
    y.sum().backward()
    (2 * x).sum().backward()
    first, again, end, second, last = seen
    assert first == again
    assert first != second
    assert -1 not in seen
    assert end == last == "end"


def test_running_function() -> None:
    assert _torch.running_function() is None
    x = torch.ones(2, requires_grad=True)
    seen = []
    y = Double.apply(x)
    y.register_hook(lambda grad: seen.append(_torch.running_function()))
    (y * 2).sum().backward()
    assert Double.running[-1] is Double
    assert seen in ([None], [Double])  # as it is about to run


def test_function_of() -> None:
    x = torch.ones(2, requires_grad=True)
    assert _torch.function_of(Double.apply(x).grad_fn) is Double
    assert _torch.function_of((x * 2).grad_fn) is None
    assert _torch.function_of(None) is None


# -- tensors ---------------------------------------------------------------------------------------


def test_version_of() -> None:
    x = torch.zeros(3)
    view, before = x[:1], _torch.version_of(x)
    view.add_(1)
    assert _torch.version_of(x) == _torch.version_of(view) == before + 1
    with torch.inference_mode(), pytest.raises(RuntimeError, match="version"):
        _torch.version_of(torch.zeros(3))


def test_version_of_is_what_subclasses_see_of_it() -> None:
    seen = []

    class Noting(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return 7

    assert torch.zeros(1).as_subclass(Noting)._version == 7
    assert seen == [_torch.version_of]


@pytest.mark.parametrize("name", [*_torch.FREE_ATTRIBUTES, *_torch.FREE_METHODS])
def test_what_a_tensor_answers_without_memory(name: str) -> None:
    made = _torch.wrapper_tensor(Shouting, (2,), dtype=torch.float32)
    with _torch.plain_tensors():
        found = getattr(made, name)
        assert not (found() if name in _torch.FREE_METHODS else found)


@pytest.mark.parametrize("name", _torch.STORAGE_METHODS)
def test_what_hands_out_memory(name: str) -> None:
    x = torch.zeros(3)
    assert getattr(x, name)().data_ptr() == x.data_ptr()


def test_storage_id() -> None:
    x, y = torch.empty(0), torch.empty(0)
    assert _torch.storage_id(x.untyped_storage()) == _torch.storage_id(x.view(0).untyped_storage())
    assert _torch.storage_id(x.untyped_storage()) != _torch.storage_id(y.untyped_storage())


def test_onednn_computes() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert isinstance(_torch.onednn_computes(dtype), bool)
    assert _torch.onednn_computes(torch.float32)


def test_ATTENTION_OPS_and_TRILINEAR_OP() -> None:
    class Names(_torch.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.name().removeprefix("aten::"))
            return func(*args, **(kwargs or {}))

    seen: set[str] = set()
    x = torch.ones(1, 1, 2, 4)
    with Names():
        nn.functional.scaled_dot_product_attention(x, x, x)
        nn.Bilinear(2, 2, 2)(torch.ones(1, 2), torch.ones(1, 2))
    assert seen & set(_torch.ATTENTION_OPS)
    assert _torch.TRILINEAR_OP in seen


@pytest.mark.parametrize("name", [*_torch.ATTENTION_OPS, _torch.CUDNN_RNN_OP])
def test_ops_of_other_devices_are_there(name: str) -> None:
    assert hasattr(torch.ops.aten, name)


def test_FROZEN_BATCH_NORM() -> None:
    program = torch.export.export(nn.BatchNorm2d(2).eval(), (torch.ones(1, 2, 3, 3),))
    nodes = program.run_decompositions({}).graph.nodes
    assert _torch.FROZEN_BATCH_NORM in {node.target for node in nodes}


def test_writes() -> None:
    aten = torch.ops.aten
    assert _torch.writes(aten.copy_.default)
    assert not any(map(_torch.writes, (aten.add.Tensor, torch.cat, "a name of a placeholder")))
