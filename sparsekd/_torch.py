"""Private names of torch, each behind a name that says what it is for; no other file uses any.

What runs once an op is torch's own function under another name, so it costs no further call.
`tests/test_torch_names.py` has a test for each, which fails by name when torch changes it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from operator import attrgetter
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable, forward_ad, profiler
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # noqa: F401
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parallel import DistributedDataParallel
from torch.sparse._semi_structured_conversions import _calculate_meta_reordering_scatter_offsets
from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode  # noqa: F401
from torch.utils._pytree import tree_map_only as map_only  # noqa: F401

# -- transforms of torch.func, forward-mode differentiation ----------------------------------------

_peek = torch._C._functorch.peek_interpreter_stack
_set_single_level = torch._C._functorch.set_single_level_autograd_function_allowed
_get_single_level = torch._C._functorch.get_single_level_autograd_function_allowed
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor

wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor
"""Return whether a tensor is of a transform of torch.func, one that has ended included."""

_is_compiling = torch.compiler.is_compiling


def in_transform() -> bool:
    """Return whether a transform of torch.func is at work: grad, vmap, jvp and what they make."""
    return _peek() is not None


def in_forward_ad() -> bool:
    """Return whether tensors may have tangents, those of torch.func.jvp included."""
    return forward_ad._current_level >= 0


def transformed(tensor: Tensor) -> bool:
    """Return whether `tensor` may have a tangent, or be one of a batch that a transform hides.

    Batches are made by torch.func.vmap and, another kind, by `is_grads_batched` and
    `vectorize=True` of torch.autograd.
    """
    return in_transform() or in_forward_ad() or (not _is_compiling() and _is_legacy_batched(tensor))


class OneLevelFunction(torch.autograd.function._SingleLevelFunction):
    """An autograd.Function whose `apply` does not look for transforms of torch.func.

    Looking, and looking for tensors left over from them, takes as long as a small layer. Outside of
    transforms it is applied as any; for inside see `apply_at_this_level`.
    """

    apply: ClassVar[Callable[..., Any]]
    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)


def apply_at_this_level(node: type[OneLevelFunction], *args: Any) -> Any:
    """Apply an autograd.Function inside an Autograd kernel, for the transform at hand alone.

    That is how torch's own kernels differentiate: the call that the forward makes of its op goes to
    the next transform by itself. `Function.apply` sends the whole Function through all transforms,
    which an Autograd kernel, having been sent through them already, must not.
    """
    before = _get_single_level()
    _set_single_level(True)
    try:
        return node.apply(*args)
    finally:
        _set_single_level(before)


@contextmanager
def derivatives_of_outer_levels() -> Iterator[None]:
    """Record derivatives in an autograd.Function, where torch turns that off.

    Inside a transform, what its forward and its jvp call belongs to the transforms around, which
    differentiate it too.
    """
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        yield


# -- the dispatcher: who else sees a call, and going past its keys ---------------------------------

_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack

jit_trace = torch._C._get_tracing_state
"""Return the graph that torch.jit.trace is recording, None outside of it."""

below_autograd = torch._C._AutoDispatchBelowAutograd
"""A context in which calls do not reach Autograd kernels."""

KeySet = torch._C.DispatchKeySet
"""The dispatch keys still ahead of a call, as an Autograd kernel receives them."""

after_autograd: KeySet = torch._C._after_autograd_keyset
"""The keys that come after Autograd's."""

plain_tensors = torch._C.DisableTorchFunctionSubclass
"""A context in which subclasses of Tensor count as plain tensors."""


def intercepted() -> bool:
    """Return whether calls are seen, by FLOP counters, fake tensors or other modes."""
    return bool(_dispatch_modes() or _function_modes())


def profiled() -> bool:
    """Return whether the profiler notes calls of ops."""
    return bool(profiler._is_profiler_enabled)


def without_autocast(device: str) -> Callable[[], AbstractContextManager[None]]:
    """Return a factory of contexts in which calls on `device` do not reach autocast."""
    key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")
    return partial(torch._C._ExcludeDispatchKeyGuard, KeySet(key))


# -- backward passes -------------------------------------------------------------------------------

current_pass = torch._C._current_graph_task_id
"""Return the number of the backward pass that is running, -1 outside of any."""


def at_end_of_pass(callback: Callable[[], None]) -> None:
    """Call back when the backward pass that is running has ended."""
    Variable._execution_engine.queue_callback(callback)


def function_of(node: object) -> type[torch.autograd.Function] | None:
    """Return the autograd.Function that a node of a graph belongs to, None for those of torch."""
    return getattr(type(node), "_forward_cls", None)


def running_function() -> type[torch.autograd.Function] | None:
    """Return the autograd.Function whose backward is running, None if there is none."""
    return function_of(torch._C._current_autograd_node())


# -- tensors ---------------------------------------------------------------------------------------

_tensor: Any = Tensor  # what mypy takes for plain attributes

version_of: Callable[[Tensor], int] = _tensor._version.__get__
"""Return how often a tensor, or one that shares its memory, has been written into in place."""

wrapper_tensor = Tensor._make_wrapper_subclass
"""Make an instance of a subclass of Tensor that has no memory of its own."""

FREE_ATTRIBUTES = ("_base", "_backward_hooks")
FREE_METHODS = ("_is_view",)
"""Attributes and methods that a tensor answers without looking at its memory."""

STORAGE_METHODS = ("_typed_storage",)
"""Methods that hand out a tensor's memory."""

storage_id: Callable[[torch.UntypedStorage], int] = attrgetter("_cdata")
"""Return a number unique to a storage while it lives, also if it is empty."""


def onednn_computes(dtype: torch.dtype) -> bool:
    """Return whether this processor has instructions with which oneDNN computes in a dtype."""
    tests = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype not in tests or tests[dtype]()


ATTENTION_OPS = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
)
TRILINEAR_OP = "_trilinear"
CUDNN_RNN_OP = "_cudnn_rnn"
"""Ops of aten that torch's FLOP counter does not know: of attention, nn.Bilinear, RNNs on GPUs."""


# -- products with 2:4 weights ---------------------------------------------------------------------

semi_structured_mm: Callable[..., Tensor] = torch._sparse_semi_structured_mm
"""Multiply a 2:4 weight `[M, K]` by a matrix; on NVIDIA GPUs only, see `has_semi_structured`.

Args:
    packed: the kept values, float16 or bfloat16 `[M, K / 2]`, rows of 16 bytes' alignment.
    metadata: where in its run of four each value lies, int16 `[M, K / 16]`, see `metadata_order`.
    other: `[K, N]` of the dtype of `packed`, N a multiple of 8.

Returns:
    `[M, N]`, row-major; sums are float32.
"""

semi_structured_addmm: Callable[..., Tensor] = torch._sparse_semi_structured_addmm
"""Do the same and add a vector `[M]`, the first argument, to every column."""


@cache
def has_semi_structured(device: torch.device) -> bool:
    """Return whether torch has these kernels for a device.

    They are CUTLASS's for sm_80, which torch builds on Linux and runs on compute capability 8.x.

    Source: aten/src/ATen/native/sparse/cuda/SparseSemiStructuredOps.cu of PyTorch.
    """
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and sys.platform == "linux"
        and torch.cuda.get_device_capability(device)[0] == 8
    )


def metadata_order(rows: int, words: int) -> Tensor:
    """Return where each word of row-major metadata lies in what the kernels read, int64.

    Args:
        rows: of the weight, a multiple of 32.
        words: of a row, each of 16 bits.
    """
    return _calculate_meta_reordering_scatter_offsets(rows, words, torch.int16, "cpu")


# -- modules ---------------------------------------------------------------------------------------

_Module = TypeVar("_Module", bound=nn.Module)
REGISTERED = ("_parameters", "_buffers", "_modules")
_CALL_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def registered(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return the very dicts of a module's parameters, buffers and children.

    They say what has several names, may be held without the module, and changed.
    """
    return module._parameters, module._buffers, module._modules


def take_hooks(new: nn.Module, old: nn.Module) -> None:
    """Move forward and backward hooks; the very dicts, so that their handles keep working."""
    for name in _CALL_HOOKS:
        setattr(new, name, getattr(old, name))


def become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give a module another class, as torch's parametrizations do; it stays the object that it is.

    Args:
        module: of a class that has no memory of its own beside `__dict__`, as nn.Modules have.
        cls: what has the same parameters, buffers and children.
    """
    module.__class__ = cls


def emptied(module: nn.Module, cls: type[_Module]) -> _Module:
    """Return a module of class `cls` with this one's attributes and hooks, and nothing registered.

    The hooks are the very dicts, so that their handles keep working. What `module.compile()` has
    made calls the old module, and is left out.

    Args:
        module: any module; it goes on working.
        cls: the class of the new one, which is not initialised.
    """
    new = cls.__new__(cls)
    vars(new).update(vars(module), **{table: {} for table in REGISTERED})
    vars(new)["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    vars(new).pop("_compiled_call_impl", None)
    return new


def is_bare(module: nn.Module) -> bool:
    """Return whether calling a module is no more than its class's forward."""
    return not (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
        or _has_any_global_hook()
    )


has_global_hook: Callable[[], bool] = _has_any_global_hook
"""Return whether there are hooks of all modules."""


def metadata_of(state_dict: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the metadata of a state_dict, by module; empty if it has none."""
    return getattr(state_dict, "_metadata", {})


# -- torch.compile and data parallelism ------------------------------------------------------------

COMPILED_MODULE = ("torch._dynamo.eval_frame", "OptimizedModule")
"""Where the class is that torch.compile wraps a module in; importing it takes seconds."""

COMPILED_PREFIX = "_orig_mod."
"""What the names of parameters in such a wrapper begin with."""


def compiler_imported() -> bool:
    """Return whether anything has imported torch.compile's machinery, as compiling does."""
    return "torch._dynamo" in sys.modules


def rebuild_buckets(wrapper: DistributedDataParallel) -> None:
    """Lay out a wrapper's gradient buckets for the sizes that its parameters have now.

    That is what unpickling a wrapper does, with the process group and the comm hooks it has. The
    public way is a new wrapper, which the caller, who holds the old one, would have to make.
    """
    wanted, sparse = wrapper._build_params_for_reducer()
    names = wrapper._build_debug_param_to_name_mapping(wanted)
    wrapper._ddp_init_helper(wanted, sparse, names, wrapper.static_graph)
    for hook, state in wrapper._comm_hooks:
        dist._register_comm_hook(wrapper.reducer, state, hook)


def leave_out_of_ddp(model: nn.Module, names: Iterable[str]) -> None:
    """Exclude these parameters and buffers from what wrappers of `model` reduce and broadcast."""
    ignored = {*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *names}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(ignored))


def fsdp_flattened(parameter: Any) -> bool:
    """Return whether FullyShardedDataParallel has put a parameter into its flat one."""
    return getattr(parameter, "_fsdp_flattened", False)


# -- graphs of torch.export ------------------------------------------------------------------------

FROZEN_BATCH_NORM = torch.ops.aten._native_batch_norm_legit_no_training.default
"""BatchNorm in eval mode, as torch.export writes it."""


def writes(target: Any) -> bool:
    """Return whether what a node of a graph calls is an op that writes to an operand."""
    schema = getattr(target, "_schema", None)
    return schema is not None and schema.is_mutable


# -- and one of Python -----------------------------------------------------------------------------

environment: Mapping[Any, Any] = getattr(os.environ, "_data", os.environ)
"""The environment variables; `os.environ.get` takes too long for every call of an op."""


def environment_key(name: str) -> Any:
    """Return the key of a variable in `environment`."""
    return name if environment is os.environ else os.environ.encodekey(name)
