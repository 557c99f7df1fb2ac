"""Derivatives of modules in the blocked layout, and what autograd does with their graphs."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import sparsekd as skd
from sparsekd.models.resnet import BasicBlock, Bottleneck


@pytest.fixture
def x() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(13, 4, 5, 6, dtype=torch.float64, generator=generator)


def two_blocks() -> nn.Module:
    return nn.Sequential(BasicBlock(4, 8, 2), Bottleneck(8, 2), nn.Conv2d(8, 4, 1))


@pytest.fixture
def twins(sparse_twins) -> tuple[nn.Module, nn.Module]:
    return sparse_twins(two_blocks)


def leaves(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    return x, *model.parameters()


def _block(training: bool) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(2)
    model = nn.Sequential(BasicBlock(2, 3)).double().train(training)
    skd.sparsify(model, sparsity=0.5, seed=0, distribution="uniform")
    return skd.optimize(model), torch.randn(5, 2, 2, 3, dtype=torch.float64, requires_grad=True)


@pytest.mark.filterwarnings("ignore:no weight is left")
@pytest.mark.parametrize("training", [True, False])
def test_derivatives_of_first_and_second_order(training: bool, blocks) -> None:
    model, x = _block(training)
    params = list(model.parameters())
    names = [name for name, _ in model.named_parameters()]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *params), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, *params), fast_mode=True)
    assert len(blocks) > 4


def test_gradient_penalty(twins, x, blocks, assert_near) -> None:
    found = []
    for model in twins:
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(model(leaf).sin().sum(), leaf, create_graph=True)
        first.square().sum().backward()
        found.append([leaf.grad, *(p.grad for p in model.parameters())])
    assert len(blocks) == 2
    assert_near(*found, 1e-9)


def test_a_block_that_runs_twice(sparse_twins, x, assert_near) -> None:
    """The second call reads what its own weights have made in the first."""
    found = []
    for model in sparse_twins(lambda: nn.Sequential(BasicBlock(4, 4))):
        for create_graph in (False, True):
            leaf = x.clone().requires_grad_()
            loss = nn.Sequential(model, model)(leaf).sin().sum()
            grads = torch.autograd.grad(loss, leaves(model, leaf), create_graph=create_graph)
            found.append([g.detach() for g in grads])
            if create_graph:
                total = sum(g.square().sum() for g in grads)
                found.append(torch.autograd.grad(total, leaves(model, leaf)))
    assert_near(found[0], found[3])
    assert_near(found[1], found[4])
    assert_near(found[2], found[5], 1e-8)


def test_an_input_that_depends_on_the_weights(sparse_twins, x, assert_near) -> None:
    found = []
    for model in sparse_twins(lambda: nn.Sequential(BasicBlock(4, 4))):
        images = x * model[0].conv1.values.sum() + model[0].bn1.weight.sum()
        loss = model(images).sin().sum()
        found.append(torch.autograd.grad(loss, list(model.parameters()), create_graph=True))
    assert_near(*found)


def test_two_backward_passes_and_accumulation(twins, x, assert_near) -> None:
    found = []
    for model in twins:
        leaf = x.clone().requires_grad_()
        loss = model(leaf).sin().sum()
        loss.backward(retain_graph=True)
        once = [t.grad.clone() for t in leaves(model, leaf)]
        loss.backward()
        twice = [t.grad.clone() for t in leaves(model, leaf)]
        assert_near(twice, [2 * t for t in once], 1e-12)
        model(x.flip(0).cos()).sin().sum().backward()  # a second batch
        found.append([*once, *(t.grad for t in leaves(model, leaf))])
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    assert_near(*found)


def test_partial_backward_passes(twins, x, assert_near) -> None:
    """Gradients of some weights leave nothing behind that the next pass would take for its own."""
    found = []
    for model in twins:
        leaf = x.clone().requires_grad_()
        loss = model(leaf).sin().sum()
        own = list(model.parameters())
        some = [torch.autograd.grad(loss, own[-1 - 3 * i], retain_graph=True)[0] for i in range(5)]
        rest = torch.autograd.grad(loss, leaves(model, leaf), retain_graph=True)
        other = torch.autograd.grad(2 * loss, leaves(model, leaf))
        found.append([*some, *rest, *other])
    assert_near(*found)


class Taps(nn.Module):
    """A block's result is read by the next block, twice, and by a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(BasicBlock(4, 8), BasicBlock(8, 8))
        self.left, self.right = nn.Sequential(BasicBlock(8, 4)), nn.Sequential(Bottleneck(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        call, leave = skd.nn.blocked.call_blocked, skd.nn.blocked.leave
        if not hasattr(self.first, "forward_blocked"):
            x = self.first(x)
            return (self.left(x).sum() + self.right(x).square().sum() + x.sin().sum())[None]
        maps = call(self.first, x)
        left, right = leave(call(self.left, maps)), leave(call(self.right, maps))
        assert isinstance(maps, skd.nn.blocked.Blocked)
        return (left.sum() + right.square().sum() + leave(maps).sin().sum())[None]


def test_a_result_that_is_read_three_times(sparse_twins, x, blocks, one_step, assert_near) -> None:
    fast, plain = sparse_twins(Taps)
    assert_near(one_step(fast, x), one_step(plain, x), 1e-9)
    assert len(blocks) == 4


WITHOUT = {
    "input": lambda model: [],
    "all": lambda model: list(model.parameters()),
    "first block": lambda model: list(model[0].parameters()),
    "second block": lambda model: list(model[1].parameters()),
    "values": lambda model: [p for n, p in model.named_parameters() if n.endswith("values")],
    "norms": lambda model: [p for n, p in model.named_parameters() if ".bn" in n],
    "biases": lambda model: [p for n, p in model.named_parameters() if n.endswith("bias")],
    "shortcut": lambda model: list(model[0].downsample.parameters()),
}


@pytest.mark.parametrize("fixed", WITHOUT)
@pytest.mark.parametrize("training", [True, False])
def test_fixed_weights(fixed: str, training: bool, twins, x, blocks, assert_near) -> None:
    found = []
    for model in twins:
        model.train(training)
        for p in WITHOUT[fixed](model):
            p.requires_grad_(False)
        leaf = x.clone().requires_grad_(fixed != "input")
        model(leaf).sin().sum().backward()
        found.append([t.grad for t in leaves(model, leaf)])
    assert len(blocks) == 2
    assert_near(*found)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant: bool, twins, x, blocks, assert_near) -> None:
    found = []
    for model in twins:
        leaf = x.clone().requires_grad_()
        y = checkpoint(model[0], leaf, use_reentrant=reentrant)
        y = checkpoint(model[1:], y, use_reentrant=reentrant)
        y.sin().sum().backward()
        found.append([*(t.grad for t in leaves(model, leaf)), *model.buffers()])
    assert len(blocks) == 3 + reentrant  # the other kind stops in the last block, once it has run
    assert_near(*found)


def test_saved_tensors_elsewhere(twins, x, blocks, assert_near) -> None:
    """Hooks bring tensors back with other strides and at odd addresses."""
    found = []

    def unpack(kept: Tensor) -> Tensor:
        flat = kept.new_empty(kept.numel() + 1)[1:]
        return flat.copy_(kept.flatten()).view(kept.shape)

    for model in twins:
        leaf = x.clone().requires_grad_()
        with saved_tensors_hooks(lambda t: t.detach().clone(), unpack):
            y = model(leaf)
        y.sin().sum().backward()
        found.append([t.grad for t in leaves(model, leaf)])
    assert len(blocks) == 2
    assert_near(*found)


def test_batches_of_gradients(twins, x, assert_near) -> None:
    found = []
    for model in twins:
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        vectors = torch.stack([y.detach().sin(), y.detach().cos()])
        for create_graph in (False, True):
            grads = torch.autograd.grad(
                y, leaves(model, leaf), vectors, is_grads_batched=True, retain_graph=True,
                create_graph=create_graph,
            )  # fmt: skip
            found.append([g.detach() for g in grads])
        mapped = torch.vmap(
            lambda v, y=y, leaf=leaf: torch.autograd.grad(y, leaf, v, retain_graph=True)[0]
        )(vectors)
        found.append([mapped])
    assert_near(found[0] + found[1] + found[2], found[3] + found[4] + found[5])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_without_gradients(
    context: Callable, training: bool, twins, x, blocks, one_step, assert_near
) -> None:
    with context():
        found = [model.train(training)(x) for model in twins]
    assert not found[0].requires_grad
    assert found[0].is_inference() == (context is torch.inference_mode)
    assert len(blocks) == 2
    assert_near([found[0]], [found[1]])
    assert_near(*(one_step(model.train(), x) for model in twins))


@pytest.mark.parametrize("name", ["0.conv1.values", "0.bn1.weight", "1.conv3.values"])
def test_weights_written_between_the_passes_raise(name: str, twins, x) -> None:
    for model in twins:
        y = model(x.requires_grad_()).sin().sum()
        with torch.no_grad():
            model.get_parameter(name).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_inputs_and_results_written_afterwards(twins, x, assert_near) -> None:
    fast, plain = twins
    found = []
    for model in (fast, plain):
        leaf = x.clone().requires_grad_()
        images = leaf * 1
        kept = images if model is fast else images.clone()
        y = model(kept)
        if model is fast:
            images.zero_()
        y.mul_(2).sin().sum().backward()
        found.append([t.grad for t in leaves(model, leaf)])
    assert_near(*found)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "where",
    ["input", "gradient", "0.conv1.values", "0.conv2.values", "0.downsample.0.values",
     "0.bn1.weight", "0.bn1.bias", "0.bn2.weight", "0.bn2.bias", "1.bn3.weight", "1.conv1.values"],
)  # fmt: skip
def test_what_is_not_finite_goes_where_ordinary_modules_bring_it(
    where: str, training: bool, value: float, twins, x, assert_near, monkeypatch, blocks
) -> None:
    found = []
    for outside in (False, True):
        model = copy.deepcopy(twins[0]).train(training)
        if outside:
            monkeypatch.setattr(skd.nn.blocked, "input_fits", lambda *args: False)
            monkeypatch.setattr(skd.nn.preactivation, "input_fits", lambda *args: False)
        leaf = x.clone().requires_grad_()
        with torch.no_grad():
            if where == "input":
                leaf[2, 1, 0, 3] = value
            elif where != "gradient":
                model.get_parameter(where)[1] = value
        y = model(leaf)
        grad = y.detach().cos().nan_to_num()
        if where == "gradient":
            grad[3, 2, 1, 0] = value
        count = len(blocks)
        y.backward(grad)
        found.append([y.detach(), *(t.grad for t in leaves(model, leaf)), *model.buffers()])
    assert count == (2 if where == "gradient" else count)
    for fast, plain in zip(*found, strict=True):
        assert torch.equal(fast.isnan(), plain.isnan())
        assert torch.equal(fast.isinf(), plain.isinf())
    assert_near(*found)


def test_anomaly_mode_and_uninitialised_memory(twins, x, assert_near, one_step) -> None:
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        with torch.autograd.detect_anomaly(check_nan=True):
            found = [one_step(model, x) for model in twins]
    finally:
        torch.use_deterministic_algorithms(False)
    assert_near(*found)


def _saved_bytes(model: nn.Module, x: Tensor) -> int:
    storages: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    del y
    return sum(storages.values())


def test_less_memory_is_kept(sparse_twins, x) -> None:
    def make() -> nn.Module:
        return nn.Sequential(*(BasicBlock(4, 4) for _ in range(4)))

    fast, plain = sparse_twins(make)
    images = torch.cat([x, x])[:24]
    assert _saved_bytes(fast, images) < 0.8 * _saved_bytes(plain, images)


def test_nothing_outlives_the_graph(twins, x, monkeypatch) -> None:
    fast = twins[0]
    made: list[weakref.ref] = []
    empty = skd.ops.cpu.blocked_map.empty

    def watched(*args) -> Tensor:
        result = empty(*args)
        made.append(weakref.ref(result))
        return result

    for module in ("blocked", "preactivation"):
        monkeypatch.setattr(f"sparsekd.ops.cpu.{module}.empty", watched)
    gc.disable()
    try:
        y = fast(x)
        loss = y.sin().sum()
        assert any(ref() is not None for ref in made)
        loss.backward(retain_graph=True)
        torch.autograd.grad(loss, fast[1].conv1.values)
        del y, loss
        assert len(made) > 6
        assert all(ref() is None for ref in made)
    finally:
        gc.enable()


def test_a_copy_taken_while_a_graph_is_alive(twins, x, one_step, assert_near) -> None:
    y = twins[0](x)
    assert_near(one_step(copy.deepcopy(twins[0]), x), one_step(copy.deepcopy(twins[0]), x))
    y.sum().backward()
