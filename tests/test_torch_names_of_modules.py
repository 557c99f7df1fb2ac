"""As `test_torch_names.py`: the private names that concern modules, compiled and parallel ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparsekd import _torch

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


def test_become_changes_the_class_and_nothing_else() -> None:
    class Other(nn.Linear):
        pass

    layer, kept = nn.Linear(2, 2), []
    layer.register_forward_hook(lambda module, args, y: kept.append(module))
    weight, before = layer.weight, dict(vars(layer))
    _torch.become(layer, Other)
    assert type(layer) is Other
    assert vars(layer) == before
    assert layer.weight is weight
    layer(torch.ones(1, 2))
    assert kept == [layer]


def test_emptied_shares_hooks_and_leaves_out_what_is_compiled() -> None:
    layer = nn.Linear(2, 2)
    calls: list[str] = []
    handle = layer.register_forward_hook(lambda *_: calls.append("hook"))
    layer.compile(backend="eager")
    layer.note = "kept"
    new = _torch.emptied(layer, nn.Identity)
    assert type(new) is nn.Identity
    assert not [*new.parameters(), *new.buffers(), *new.children()]
    assert len([*layer.parameters()]) == 2
    assert new.note == "kept"
    assert torch.equal(new(torch.ones(2)), torch.ones(2))
    assert calls == ["hook"]
    handle.remove()
    new(torch.ones(2))
    assert calls == ["hook"]
    new.register_buffer("b", torch.ones(1), persistent=False)
    layer.register_buffer("b", torch.ones(1))
    assert "b" in layer.state_dict()


def test_is_bare_knows_global_hooks_replaced_forwards_and_compiled_modules() -> None:
    module = nn.ReLU()
    with nn.modules.module.register_module_forward_hook(lambda *args: None):
        assert not _torch.is_bare(module)
    assert _torch.is_bare(module)
    module.forward = module.forward
    assert not _torch.is_bare(module)
    compiled = nn.ReLU()
    compiled.compile()
    assert not _torch.is_bare(compiled)


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


def test_rebuild_buckets(process_group) -> None:
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


def test_leave_out_of_ddp(process_group) -> None:
    model = nn.BatchNorm1d(2)
    _torch.leave_out_of_ddp(model, ["running_mean"])
    _torch.leave_out_of_ddp(model, ["running_var"])
    wrapper = DistributedDataParallel(model)
    assert wrapper.parameters_to_ignore == {"running_mean", "running_var"}


def test_fsdp_flattened(process_group) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    parameter = nn.Parameter(torch.zeros(2))
    assert not _torch.fsdp_flattened(parameter)
    model = nn.Linear(2, 2)
    FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    assert all(map(_torch.fsdp_flattened, model.parameters()))


# -- and one of Python -----------------------------------------------------------------------------


def test_environment(monkeypatch) -> None:
    key = _torch.environment_key("NO_VARIABLE_OF_OURS")
    assert key not in _torch.environment
    monkeypatch.setenv("NO_VARIABLE_OF_OURS", "1")
    assert key in _torch.environment
    monkeypatch.delenv("NO_VARIABLE_OF_OURS")
    assert key not in _torch.environment
    assert "NO_VARIABLE_OF_OURS" not in os.environ
