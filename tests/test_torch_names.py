"""The private names of torch that sparsekd relies on still mean what it takes them for."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._vmap_internals import _vmap
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from sparsekd import _torch

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


class Double(torch.autograd.Function):
    """Twice a tensor; without setup_context, so Function.apply refuses it inside a transform."""

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


# -- the dispatcher --------------------------------------------------------------------------------


class Shouting(Tensor):
    """A subclass whose every call would raise."""

    @classmethod
    def __torch_function__(cls, *args, **kwargs):
        raise AssertionError("called")

    __torch_dispatch__ = __torch_function__


def test_intercepted_knows_modes_and_the_profiler() -> None:
    assert not _torch.intercepted()
    with torch.device("meta"):  # a mode of functions
        assert _torch.intercepted()
    with FlopCounterMode(display=False):  # a mode of the dispatcher
        assert _torch.intercepted()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert _torch.intercepted()
    assert not _torch.intercepted()


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


# -- modules ---------------------------------------------------------------------------------------


def test_registered() -> None:
    module = nn.BatchNorm2d(2)
    module.child = module.other = nn.ReLU()
    parameters, buffers, children = _torch.registered(module)
    assert list(parameters) == ["weight", "bias"]
    assert list(buffers) == ["running_mean", "running_var", "num_batches_tracked"]
    assert list(children) == ["child", "other"]
    children["child"], parameters["bias"] = nn.Identity(), None
    assert isinstance(module.child, nn.Identity)
    assert module.bias is None
    assert [vars(module)[name] for name in _torch.REGISTERED] == [parameters, buffers, children]


_HOOKS = {
    "forward": lambda m, hook: m.register_forward_hook(hook),
    "forward pre": lambda m, hook: m.register_forward_pre_hook(hook),
    "backward": lambda m, hook: m.register_full_backward_hook(hook),
    "backward pre": lambda m, hook: m.register_full_backward_pre_hook(hook),
    "forward with kwargs": lambda m, hook: m.register_forward_hook(hook, with_kwargs=True),
    "forward pre with kwargs": lambda m, hook: m.register_forward_pre_hook(hook, with_kwargs=True),
    "forward always": lambda m, hook: m.register_forward_hook(hook, always_call=True),
}


@pytest.mark.parametrize("kind", _HOOKS)
def test_take_hooks_and_is_bare(kind: str) -> None:
    seen = []
    old, new = nn.Linear(2, 2), nn.Linear(2, 2)
    assert _torch.is_bare(old)
    handle = _HOOKS[kind](old, lambda *args: seen.append(len(args)))
    assert not _torch.is_bare(old)
    _torch.take_hooks(new, old)
    new(torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert len(seen) == 1
    handle.remove()
    assert _torch.is_bare(new)


def test_take_hooks_takes_every_hook_of_a_call() -> None:
    """A kind that torch adds is one more dict or flag of a new module."""
    other = ("_state_dict_", "_load_state_dict_", "_non_persistent_buffers_set")
    own = {n for n in vars(nn.Module()) if n.startswith("_") and not n.startswith(other)}
    assert own == {*_torch._CALL_HOOKS, *_torch.REGISTERED}


def test_is_bare_knows_global_hooks_and_replaced_forwards() -> None:
    module = nn.ReLU()
    with nn.modules.module.register_module_forward_hook(lambda *args: None):
        assert not _torch.is_bare(module)
    assert _torch.is_bare(module)
    module.forward = module.forward
    assert not _torch.is_bare(module)


def test_metadata_of() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    assert _torch.metadata_of(model.state_dict())["0"] == {"version": 2}
    assert _torch.metadata_of({}) == {}


def test_BatchNorm_is_the_base_of_all() -> None:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    assert all(issubclass(kind, _torch.BatchNorm) for kind in kinds)


def test_methods_that_torch_calls() -> None:
    """Those of nn.Module that sparse modules override."""
    seen = []

    class Noting(nn.Linear):
        def _apply(self, fn, recurse=True):
            seen.append("apply")
            return super()._apply(fn, recurse)

        def _save_to_state_dict(self, destination, prefix, keep_vars):
            seen.append("save")
            super()._save_to_state_dict(destination, prefix, keep_vars)

        def _load_from_state_dict(
            self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
        ):
            seen.append("load")
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing, unexpected, errors
            )

    model = nn.Sequential(Noting(2, 2)).double()
    model.load_state_dict(model.state_dict())
    assert seen == ["apply", "save", "load"]


# -- torch.compile and data parallelism ------------------------------------------------------------


def test_COMPILED_MODULE_COMPILED_PREFIX_and_compiler_imported() -> None:
    # In a process of its own: here something may have imported the compiler already.
    code = (
        "import sys, torch; from sparsekd import _torch; module, name = _torch.COMPILED_MODULE;"
        "assert not _torch.compiler_imported() and module not in sys.modules;"
        "model = torch.compile(torch.nn.ReLU(), backend='eager');"
        "assert _torch.compiler_imported();"
        "assert type(model) is getattr(sys.modules[module], name);"
        "names = dict(torch.compile(torch.nn.PReLU(), backend='eager').named_parameters());"
        "assert list(names) == [_torch.COMPILED_PREFIX + 'weight']"
    )
    path = Path(_torch.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=path, timeout=120)


@pytest.fixture
def alone():
    """Be the only process of a group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_rebuild_buckets(alone) -> None:
    model = nn.Linear(2, 2, bias=False)
    wrapper = DistributedDataParallel(model)
    calls = []

    def hook(state, bucket):  # torch looks at annotations, which are strings here
        calls.append(bucket.buffer().numel())
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    wrapper.register_comm_hook(None, hook)
    model.weight.data = torch.empty(0, dtype=torch.float64)  # torch forgets the shape by it
    model.weight.data = torch.ones(3, 2)
    _torch.rebuild_buckets(wrapper)
    wrapper(torch.ones(1, 2)).sum().backward()
    assert calls == [6]
    assert torch.equal(model.weight.grad, torch.ones(3, 2))


def test_leave_out_of_ddp(alone) -> None:
    model = nn.BatchNorm1d(2)
    _torch.leave_out_of_ddp(model, ["running_mean"])
    _torch.leave_out_of_ddp(model, ["running_var"])
    wrapper = DistributedDataParallel(model)
    assert wrapper.parameters_to_ignore == {"running_mean", "running_var"}


def test_fsdp_flattened(alone) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    parameter = nn.Parameter(torch.zeros(2))
    assert not _torch.fsdp_flattened(parameter)
    model = nn.Linear(2, 2)
    FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    assert all(map(_torch.fsdp_flattened, model.parameters()))


# -- and one of Python -----------------------------------------------------------------------------


def test_environment(monkeypatch) -> None:
    key = _torch.environment_key("SPARSEKD_TEST")
    assert key not in _torch.environment
    monkeypatch.setenv("SPARSEKD_TEST", "1")
    assert key in _torch.environment
    monkeypatch.delenv("SPARSEKD_TEST")
    assert key not in _torch.environment
    assert "SPARSEKD_TEST" not in os.environ
