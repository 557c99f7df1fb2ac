"""Blocks that were prepared at an earlier call: used where nothing changed, and only there."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import sparsekd as skd
from sparsekd.models.resnet import BasicBlock
from sparsekd.models.wide_resnet import WideResNet
from sparsekd.nn import blocked, blocked_models, preactivation
from sparsekd.nn.convert import sparse_modules
from sparsekd.ops.dispatch.context import backend


def images(batch: int = 16, channels: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, 6, 6, dtype=torch.float64, generator=generator)


def stages() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 12, 2)),
        nn.Sequential(nn.Conv2d(12, 8, 1, bias=True), nn.BatchNorm2d(8), nn.ReLU()),
    )


@pytest.fixture
def prepared(monkeypatch) -> list[str]:
    """Return a list that grows by one entry for each block that has to be prepared."""
    seen: list[str] = []

    def noting(run: Callable) -> Callable:
        def noted(owner: nn.Module, *args, **options):
            seen.append(type(owner).__name__)
            return run(owner, *args, **options)

        return noted

    run_block = noting(blocked.run_block)
    monkeypatch.setattr(blocked, "run_block", run_block)
    monkeypatch.setattr(blocked_models, "run_block", run_block)
    run_preactivation = noting(preactivation.run_preactivation)
    monkeypatch.setattr(preactivation, "run_preactivation", run_preactivation)
    return seen


@pytest.fixture
def settled(sparse_twins, one_step, assert_near, prepared) -> tuple[nn.Module, nn.Module]:
    """Return twins that have run, so that no block is prepared again."""
    fast, plain = sparse_twins(stages)
    for _ in range(2):
        assert_near(one_step(fast, images()), one_step(plain, images()))
    assert prepared == ["BlockedBasicBlock", "BlockedBasicBlock", "SparseConv2d"]
    prepared.clear()
    return fast, plain


def _rewire(model: nn.Module) -> None:
    for _, module in sparse_modules(model):
        module.rewire(module.topology.mask().flip(0))


def _write_indices(model: nn.Module) -> None:
    conv = model[0][0].conv1
    other = torch.flip(conv.topology.mask(), (0,))
    found = skd.Topology.from_mask(other)
    conv.crow_indices.copy_(found.crow_indices)
    conv.col_indices.copy_(found.col_indices)


def _replace_values(model: nn.Module) -> None:
    conv = model[0][1].conv2
    conv.values = nn.Parameter(conv.values.detach() * 2)


def _replace_gamma(model: nn.Module) -> None:
    model[1][1].weight = nn.Parameter(torch.full((8,), 3.0, dtype=torch.float64))


def _drop_bias(model: nn.Module) -> None:
    model[1][0].bias = None


def _load(model: nn.Module) -> None:
    other = copy.deepcopy(model)
    _rewire(other)
    for p in other.parameters():
        p.data.mul_(1.5)
    model.load_state_dict(other.state_dict())


def _assign(model: nn.Module) -> None:
    state = {name: t.clone() * 2 if t.is_floating_point() else t.clone()
             for name, t in model.state_dict().items()}  # fmt: skip
    model.load_state_dict(state, assign=True)


def _hook(model: nn.Module) -> None:
    model[0][0].conv2.register_forward_hook(lambda module, args, y: 2 * y)


def _pre_hook_of_norm(model: nn.Module) -> None:
    model[1][1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def _hook_of_relu(model: nn.Module) -> None:
    model[1][2].register_forward_hook(lambda module, args, y: y + 1)


def _momentum(model: nn.Module) -> None:
    model[0][0].bn1.momentum = 0.7


def _eps(model: nn.Module) -> None:
    model[1][1].eps = 0.5


def _stride(model: nn.Module) -> None:
    model[1][0].stride = (2, 2)


def _forward(model: nn.Module) -> None:
    conv = model[0][0].conv1
    conv.forward = lambda x: type(conv).forward(conv, x) * 3


def _other_module(model: nn.Module) -> None:
    torch.manual_seed(5)
    model[0][0].conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False, dtype=torch.float64)


def _other_norm(model: nn.Module) -> None:
    model[1][1] = nn.BatchNorm2d(8, momentum=0.9, dtype=torch.float64)


def _other_activation(model: nn.Module) -> None:
    model[1][2] = nn.GELU()


class Doubled(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return 2 * values


def _parametrize(model: nn.Module) -> None:
    parametrize.register_parametrization(model[1][0], "bias", Doubled())


def _parametrize_norm(model: nn.Module) -> None:
    parametrize.register_parametrization(model[1][1], "weight", Doubled())


CHANGES = {
    f.__name__[1:]: f
    for f in (
        _rewire, _replace_values, _replace_gamma, _drop_bias, _load, _assign, _hook,
        _pre_hook_of_norm, _hook_of_relu, _momentum, _eps, _stride, _forward, _other_module,
        _other_norm, _other_activation, _parametrize, _parametrize_norm,
    )
} | {
    "eval": lambda model: model.eval(),
    "one norm in eval": lambda model: model[0][1].bn2.eval(),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_changes_counts(change, settled, one_step, assert_near) -> None:
    for model in settled:
        change(model)
    for _ in range(3):
        assert_near(*(one_step(model, images()) for model in settled))


@pytest.mark.filterwarnings("ignore:.*wrote other positions")
def test_indices_that_were_overwritten_count(settled, one_step, assert_near) -> None:
    for model in settled:
        _write_indices(model)
    assert_near(*(one_step(model, images()) for model in settled))


def test_what_is_written_into_tensors_counts(settled, one_step, assert_near, prepared) -> None:
    for model in settled:
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor.mul_(1.25)
    assert_near(*(one_step(model, images()) for model in settled))
    assert prepared == []


def test_requires_grad_counts(settled, one_step, assert_near, prepared) -> None:
    for model in settled:
        model[0][0].conv1.values.requires_grad_(False)
        model[0][0].bn2.weight.requires_grad_(False)
    assert_near(*(one_step(model, images()) for model in settled))
    assert settled[0][0][0].conv1.values.grad is None
    assert prepared == []


def test_each_size_is_prepared_once(settled, one_step, assert_near, prepared) -> None:
    for batch in (16, 24, 16, 24, 23, 23):
        assert_near(*(one_step(model, images(batch)) for model in settled))
    assert len(prepared) == 2 * 3


def test_modes_take_turns(settled, one_step, assert_near) -> None:
    for training in (True, False, True, False):
        assert_near(*(one_step(model.train(training), images()) for model in settled))


def test_dtype_counts(settled, one_step, prepared, assert_near) -> None:
    for dtype in (torch.float32, torch.float64):
        for model in settled:
            model.to(dtype)
        found, expected = (one_step(model, images().to(dtype)) for model in settled)
        assert found[0].dtype == dtype
        assert_near(found, expected, 1e-4)
    x = images(32).float()
    with pytest.raises(Exception) as plain:
        settled[1](x)
    with pytest.raises(type(plain.value)):
        settled[0](x)


def test_threads_count(settled, one_step, assert_near, prepared) -> None:
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_near(*(one_step(model, images()) for model in settled))
    finally:
        torch.set_num_threads(threads)
    assert len(prepared) == 6


def test_a_backend_that_is_asked_for_counts(settled, blocks, one_step, assert_near) -> None:
    with backend("reference"):
        assert_near(*(one_step(model, images()) for model in settled))
    assert blocks == []
    with backend("cpp"):
        assert_near(*(one_step(model, images()) for model in settled))


def test_a_global_hook_counts(settled) -> None:
    names: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, y: names.append(type(module).__name__)
    )
    try:
        settled[0](images())
    finally:
        handle.remove()
    assert names.count("SparseConv2d") == 6


def test_a_mode_counts(settled, assert_near) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for model in settled:
        with FlopCounterMode(display=False) as counter:
            model(images()).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_prepared_by_themselves(how, settled, one_step, assert_near, prepared) -> None:
    fast, plain = settled
    other = copy.deepcopy(fast) if how == "deepcopy" else pickle.loads(pickle.dumps(fast))
    twin = copy.deepcopy(plain)
    for model in (other, twin):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)
    for _ in range(2):
        assert_near(one_step(other, images()), one_step(twin, images()))
        assert_near(one_step(fast, images()), one_step(plain, images()))
    # Whoever is copied knows its copies from then on, and is looked at anew.
    assert len(prepared) == (6 if how == "deepcopy" else 3)


def test_norms_of_a_cumulative_average_are_asked_in_every_call(
    settled, one_step, assert_near
) -> None:
    for model in settled:
        model[1][1].momentum = None
    for _ in range(4):
        assert_near(*(one_step(model, images()) for model in settled))


def test_preactivation_blocks(sparse_twins, one_step, assert_near, prepared) -> None:
    models = sparse_twins(lambda: WideResNet(10, 1))
    x = images(16, 3)
    for _ in range(2):
        prepared.clear()
        assert_near(*(one_step(model, x) for model in models), 1e-9)
    assert prepared == ["BlockedWideResNet"]  # its first convolution is dense
    for change in (
        lambda model: _rewire(model),
        lambda model: setattr(model.layer1[0].bn1, "eps", 0.1),
        lambda model: model.eval(),
        lambda model: model.layer2[0].conv1.register_forward_hook(lambda m, args, y: 2 * y),
        lambda model: model.train(),
    ):
        for model in models:
            change(model)
        for _ in range(2):
            assert_near(*(one_step(model, x) for model in models), 1e-9)


def test_nothing_keeps_a_model_alive(sparse_twins, one_step) -> None:
    fast, _ = sparse_twins(stages)
    for block in fast[0]:
        block.conv1.parent = (block,)  # as some code does
    one_step(fast, images())
    one_step(fast, images())
    dead = [weakref.ref(fast), *(weakref.ref(m) for m in fast.modules()),
            *(weakref.ref(p) for p in fast.parameters())]  # fmt: skip
    del fast, block
    gc.collect()
    assert all(ref() is None for ref in dead)
